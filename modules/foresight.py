"""Foresight's predictor: from the latest runs of an author's codes to the code of the next segment.

The pipeline is that of Foresight (Kuaishou), section "Encoder-decoder". With the run's code ``c``, its length ``w`` and
its place counted from the newest run::

    I <- Emb(c) + Emb(bucket(w)) + Emb(place)               [runs, dim]
    I <- I + SelfAttn(norm(I));  I <- I + FFN(norm(I))      for each layer of the encoder
    D <- BOS                                                [1, dim], learnt
    D <- D + CrossAttn(norm(D), I);  D <- D + FFN(norm(D))  for each layer of the decoder
    D <- norm(D)
    p <- softmax(D Emb^T + bias)                            over all codes; the same table as that of the input

The paper gives neither the norms, the places, nor the buckets of the lengths. Here norms come before each part, as in
most Transformers since Xiong et al. (2020), places are learnt vectors, and a length has four buckets for each doubling.
The bias is one number for each code, which its frequency needs; it starts as the logarithm of the frequency.

Of an attention, values and output start as the identity. So D starts as a mean of the runs' vectors, which the softmax
compares with vectors of the same table, and training has to learn only which runs count.

The paper stops there. With ``softmax = "distance"`` the logit of a code is ``-|D - Emb(c)|^2 / 2`` plus its bias (the
length of D cancels). If the next vector is spread around D as a Gaussian, the nearest centroids are the most probable
codes; a product alone prefers those with long vectors, and leaves it to each code's bias to correct that.

``copy`` adds that a room often shows again what its author showed lately (a pointer network, See
et al., 2017): with the gate ``g = sigmoid(w D)`` and the attention ``a = softmax(I W D)`` over the runs,

    p(c) <- (1 - g) p(c) + g * (sum of a over the runs with the code c)

An encoder over many runs is most of the work, and it finds out where the room is in its programme, for which the newest
runs suffice. With ``encoded_runs`` it reads only these. The older runs keep their embeddings: the decoder attends to
them, and they can be copied, so they tell what else the author shows.

A ranker reads three vectors of a forecast (:meth:`ForesightPredictor.forecast`): the pooled ``I``; ``D`` in the space
of the centroids; and the mean of the centroids under p.

The runs are padded at the front. A padded place is seen by no other one, whatever it holds. An author without any run
has an ``I`` of zeros and a ``D`` that depends on BOS alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

TableStart = Literal["frozen", "learnt", "random"]
"""Table of the codes: the centroids, which stay; the centroids, which are trained; or random vectors, trained."""

Softmax = Literal["product", "distance"]
"""Logits of the codes: products of D with their vectors, or half of the negative squared distances to them."""

HistoryPooling = Literal["mean", "last", "attention"]
"""Pooling of I over the runs: their mean, that of the newest run, or the mean weighted by the softmax of ``I D``."""

LARGEST_LENGTH = 1 << 17
"""Longest run with a bucket of its own, 45 days of segments of 30 seconds."""


@dataclass(frozen=True)
class ForesightSize:
    """Sizes of the predictor.

    Attributes:
        codes: number of codes N.
        runs: longest context.
        dim: width of the model, a multiple of ``heads``.
        heads: attention heads.
        encoder_layers, decoder_layers: number of layers, 1 or more.
        feed_forward: width inside a feed-forward part.
        dropout: share of values that are dropped in training: of the outputs of both parts of a layer, and inside the
            feed-forward part. Weights of attention are not dropped, which would take a third of the time.
        table: start of the table of the codes.
        copy: mix the softmax with the codes of the runs.
        softmax: logits of the codes.
        encoded_runs: newest runs that the encoder reads; 0 for all.
    """

    codes: int
    runs: int = 100
    dim: int = 64
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 1
    feed_forward: int = 256
    dropout: float = 0.0
    table: TableStart = "learnt"
    copy: bool = False
    softmax: Softmax = "product"
    encoded_runs: int = 0


class ForesightOutput(NamedTuple):
    """Output of the predictor for n authors.

    Attributes:
        history: ``[n, runs, dim]``, the encoder's output I, and the embeddings of the runs that it does not read, all
            after the norm; zeros at padded places.
        future: ``[n, dim]``, the decoder's output D.
        copied: ``[n, runs]``, probability that the next code is copied from each run; zeros without ``copy``.
    """

    history: Tensor
    future: Tensor
    copied: Tensor


class Forecast(NamedTuple):
    """Vectors of a forecast for n authors, float32.

    Attributes:
        encoder: ``[n, dim]``, the pooled I; zeros without any run.
        decoder: ``[n, centroid_dim]``, D in the space of the table of the codes: its product with a row of the table
            is the logit of the code, but for a part that does not depend on D. The paper's D is this one, since its
            model has no projection.
        expected: ``[n, centroid_dim]``, mean of the centroids under the probabilities of the next code.
    """

    encoder: Tensor
    decoder: Tensor
    expected: Tensor


class ForesightPredictor(nn.Module):
    """The predictor.

    Args:
        size: its sizes.
        centroids: ``[codes, centroid_dim]`` float, the codebook's; for ``random`` its shape alone is used.
        counts: ``[codes]``, targets of training by code, from which the bias starts; None for equal ones.
    """

    bounds: Tensor

    def __init__(self, size: ForesightSize, centroids: Tensor, counts: Tensor | None = None) -> None:
        super().__init__()
        self.size = size
        self.table = CodeTable(centroids, size.dim, size.table, counts)
        self.lengths = nn.Embedding(len(length_bounds()) + 1, size.dim)
        self.places = nn.Embedding(size.runs, size.dim)
        for embedding in (self.lengths, self.places):
            nn.init.normal_(embedding.weight, std=CodeTable.SCALE)
        if size.encoded_runs:
            # Among the older runs the place says little, and a random vector would hide the code at the start.
            nn.init.zeros_(self.places.weight[size.encoded_runs :])
        self.encoder = nn.ModuleList(_Layer(size) for _ in range(size.encoder_layers))
        self.encoder_norm = nn.LayerNorm(size.dim)
        self.first = nn.Parameter(CodeTable.SCALE * torch.randn(size.dim))
        self.decoder = nn.ModuleList(_Layer(size) for _ in range(size.decoder_layers))
        self.decoder_norm = nn.LayerNorm(size.dim)
        if size.copy:
            self.point = nn.Linear(size.dim, size.dim, bias=False)
            nn.init.eye_(self.point.weight)
            self.gate = nn.Linear(size.dim, 1)
        self.register_buffer("bounds", torch.tensor(length_bounds()), persistent=False)

    def forward(self, code: Tensor, length: Tensor, table: Tensor | None = None) -> ForesightOutput:
        """Return the encoder's and the decoder's output.

        Args:
            code: ``[n, L]`` int, the newest run last, -1 at padded places, which are at the front; ``L <= runs``.
            length: ``[n, L]`` int, segments of each run.
            table: result of ``self.table()``, if it is needed for several calls; None looks up the codes alone.
        """
        known = code >= 0
        held = code.clamp(min=0)
        states = self.table.rows(held) if table is None else table[held]
        states = states + self.lengths(torch.bucketize(length, self.bounds, right=True))
        states = states + self.places.weight[: code.shape[1]].flip(0)
        states = states.masked_fill(~known[:, :, None], 0)
        some = known.any(1)
        # A row of the softmax needs one place: a row without any run sees all places, and its result is not used.
        seen = (known | ~some[:, None])[:, None, None]
        older = max(code.shape[1] - (self.size.encoded_runs or code.shape[1]), 0)
        newest = states[:, older:]
        for layer in self.encoder:
            newest = layer(newest, None, seen[..., older:], some)
        states = torch.cat([states[:, :older], newest], 1) if older else newest
        states = self.encoder_norm(states).masked_fill(~known[:, :, None], 0)
        future = self.first.expand(len(code), 1, -1)
        for layer in self.decoder:
            future = layer(future, states, seen, some)
        future = self.decoder_norm(future[:, 0])
        return ForesightOutput(states, future, self._copied(states, future, known, seen[:, 0, 0]))

    def _copied(self, states: Tensor, future: Tensor, known: Tensor, seen: Tensor) -> Tensor:
        """Return the probability that the next code is copied from each run, ``[n, L]`` float32."""
        if not self.size.copy:
            return known.new_zeros(known.shape, dtype=torch.float32)
        scores = (states @ self.point(future)[:, :, None])[:, :, 0].float() / math.sqrt(self.size.dim)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(1) * torch.sigmoid(self.gate(future).float())
        return weights.masked_fill(~known, 0)

    def log_p(self, code: Tensor, output: ForesightOutput, table: Tensor | None = None) -> Tensor:
        """Return the logarithm of the probabilities of all codes ``[n, codes]``, float32.

        Args:
            code: ``[n, L]`` int, of the runs.
            output: result for them.
            table: as in :meth:`forward`.
        """
        log_p = self._scores(output.future, self.table() if table is None else table, self.table.bias).log_softmax(1)
        if not self.size.copy:
            return log_p
        copied = torch.zeros_like(log_p).scatter_add_(1, code.clamp(min=0).long(), output.copied)
        return torch.logaddexp(log_p + _log_rest(output.copied)[:, None], copied.log())

    def forecast(
        self,
        code: Tensor,
        length: Tensor,
        pooling: HistoryPooling,
        centroids: Tensor,
        table: Tensor | None = None,
    ) -> Forecast:
        """Return the vectors of a forecast.

        Args:
            code, length: ``[n, L]`` int, see :meth:`forward`.
            pooling: of I over the runs.
            centroids: ``[codes, centroid_dim]`` float32, the codebook's own.
            table: as in :meth:`forward`.
        """
        table = self.table() if table is None else table
        output = self(code, length, table)
        # The mean under log_p: linear in p, so the copied codes need no place among all codes.
        drawn = self._scores(output.future, table, self.table.bias).softmax(1) @ centroids
        copied = (output.copied[:, None] @ centroids[code.clamp(min=0).long()])[:, 0]
        expected = _log_rest(output.copied).exp()[:, None] * drawn + copied
        decoder = output.future.float() @ self.table.project.weight.float()
        return Forecast(_pooled(output, code >= 0, pooling).float(), decoder, expected)

    def losses(self, code: Tensor, output: ForesightOutput, target: Tensor, sample: CodeSample | None = None) -> Tensor:
        """Return ``-log p(target)`` of each row ``[n]``, float32.

        Args:
            code: ``[n, L]`` int, of the runs.
            output: result for them.
            target: ``[n]`` int64, the codes that came.
            sample: codes that stand for all others, see :func:`sampled_softmax`; None computes the full softmax.
        """
        future = output.future
        if sample is None:
            scores = self._scores(future, self.table(), self.table.bias)
            losses = functional.cross_entropy(scores, target, reduction="none")
        else:
            vectors = self.table.rows(target)
            own = (future * vectors).sum(1).float() + self._offset(vectors, self.table.bias[target]).float()
            others = self._scores(future, self.table.rows(sample.code), self.table.bias[sample.code])
            losses = sampled_softmax(own, others, target, sample)
        if not self.size.copy:
            return losses
        copied = output.copied.where(code == target[:, None], output.copied.new_zeros(())).sum(1)
        return -torch.logaddexp(_log_rest(output.copied) - losses, copied.clamp(min=_LEAST).log())

    def _scores(self, future: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
        """Return the logits ``[n, C]`` of the codes with the vectors ``[C, dim]``, up to a number for each row."""
        return torch.addmm(self._offset(vectors, bias), future, vectors.T).float()

    def _offset(self, vectors: Tensor, bias: Tensor) -> Tensor:
        """Return the part of the logits that does not depend on D, ``[C]``."""
        return bias - vectors.square().sum(1) / 2 if self.size.softmax == "distance" else bias


class CodeTable(nn.Module):
    """One vector for each code: the codebook's centroids, projected to the model's width, and a bias.

    The centroids are moved and scaled to mean 0 and variance 1 over all their elements, so that the scale of the
    content vectors does not matter.

    Args:
        centroids: ``[codes, centroid_dim]`` float.
        dim: width of the model.
        start: see :data:`TableStart`.
        counts: ``[codes]``, how often each code came; None for equal ones.
    """

    SCALE = 0.2
    """Standard deviation of an element at the start. With D of length sqrt(dim), the first logits are small."""

    def __init__(self, centroids: Tensor, dim: int, start: TableStart, counts: Tensor | None = None) -> None:
        super().__init__()
        vectors = centroids.detach().double()
        if start == "random":
            vectors = torch.randn(centroids.shape).double()
        vectors = vectors - vectors.mean(0)
        vectors = (vectors / vectors.std(correction=0).clamp(min=1e-12)).float()
        if start == "frozen":
            self.register_buffer("vectors", vectors)
        else:
            self.vectors = nn.Parameter(vectors)
        self.project = nn.Linear(centroids.shape[1], dim, bias=False)
        # Orthogonal, so that distances of codes stay as they are.
        nn.init.orthogonal_(self.project.weight, gain=self.SCALE)
        # One more of each code, so that none is impossible.
        frequency = torch.ones(len(centroids)) if counts is None else counts.float() + 1
        self.bias = nn.Parameter((frequency / frequency.mean()).log())

    def forward(self) -> Tensor:
        """Return the vectors of all codes ``[codes, dim]``."""
        vectors: Tensor = self.project(self.vectors)
        return vectors

    def rows(self, code: Tensor) -> Tensor:
        """Return the vectors of codes of any shape, ``[..., dim]``."""
        vectors: Tensor = self.project(self.vectors[code])
        return vectors


class CodeSample(NamedTuple):
    """Codes that stand for all codes in a sampled softmax.

    Attributes:
        code: ``[S]`` int64, drawn with replacement.
        log_expected: ``[S]`` float32, logarithm of how often each is expected among S draws.
    """

    code: Tensor
    log_expected: Tensor

    @staticmethod
    def draw(probability: Tensor, size: int, generator: torch.Generator) -> CodeSample:
        """Draw ``size`` codes with the probabilities ``[codes]``, which sum to 1 and are above 0."""
        code = torch.multinomial(probability, size, replacement=True, generator=generator)
        return CodeSample(code, (probability[code] * size).log().float())


def sampled_softmax(own: Tensor, others: Tensor, target: Tensor, sample: CodeSample) -> Tensor:
    """Return the sampled softmax loss of each row ``[n]``.

    The full softmax divides by the sum Z of ``exp(o_j)`` over all codes j. Here the target's own term is exact, and the
    others are estimated from the sample (importance sampling; Jean et al., 2015)::

        Z' = exp(o_target) + sum over drawn j != target of exp(o_j) / (S q_j)

    The expectation of Z' is Z for any q above 0. The loss ``log Z' - o_target`` and its gradient tend to those of the
    full softmax as S grows.

    Args:
        own: ``[n]`` float32, logit of each row's target.
        others: ``[n, S]`` float32, logits of the drawn codes, the same codes for all rows.
        target: ``[n]`` int64.
        sample: the drawn codes.
    """
    terms = others - sample.log_expected
    terms = terms.masked_fill(sample.code == target[:, None], -torch.inf)
    return torch.cat([own[:, None], terms], 1).logsumexp(1) - own


def length_bounds() -> list[int]:
    """Return the least length of each bucket from the second on: four buckets for each doubling, lengths up to 8 alone.

    A phase of a room ends after a number of segments that is more or less usual, so coarser buckets lose information.
    """
    last = 4 * (LARGEST_LENGTH.bit_length() - 1)
    return sorted({math.ceil(2 ** (quarter / 4) - 1e-9) for quarter in range(1, last + 1)})


class _Layer(nn.Module):
    """Attention and a feed-forward part, each added to its input after a norm."""

    def __init__(self, size: ForesightSize) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, nn.Dropout(size.dropout)
        self.attention_norm = nn.LayerNorm(size.dim)
        self.query, self.out = nn.Linear(size.dim, size.dim), nn.Linear(size.dim, size.dim)
        # A bias of the keys would change no weight of the softmax, and one of the values can stand in that of ``out``.
        self.key_value = nn.Linear(size.dim, 2 * size.dim, bias=False)
        nn.init.eye_(self.out.weight)
        nn.init.eye_(self.key_value.weight[size.dim :])
        self.feed_forward_norm = nn.LayerNorm(size.dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(size.dim, size.feed_forward),
            nn.GELU(),
            nn.Dropout(size.dropout),
            nn.Linear(size.feed_forward, size.dim),
            nn.Dropout(size.dropout),
        )

    def forward(self, states: Tensor, memory: Tensor | None, seen: Tensor, some: Tensor) -> Tensor:
        """Return the layer's output ``[n, Q, dim]``.

        Args:
            states: ``[n, Q, dim]``.
            memory: ``[n, L, dim]`` to attend to; None attends to the states.
            seen: ``[n, 1, 1, L]`` bool, places that are attended to.
            some: ``[n]`` bool, rows that have something to attend to.
        """
        normed = self.attention_norm(states)
        attended = self.dropout(self._attend(normed, normed if memory is None else memory, seen))
        states = states + attended.where(some[:, None, None], attended.new_zeros(()))
        added: Tensor = states + self.feed_forward(self.feed_forward_norm(states))
        return added

    def _attend(self, queries: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        query = self.query(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if queries.shape[1] == 1:
            return self._attend_once(query[:, :, 0], memory, seen[:, 0])
        key, value = self.key_value(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _attend_once(self, query: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Return the same for one query of each row, without the keys and the values of all places.

        The matrices of keys and values are moved to the sides of the query and of the mean: ``q (W m) = (q W) m``.

        Args:
            query: ``[n, heads, dim / heads]``.
            memory: ``[n, L, dim]``.
            seen: ``[n, 1, L]`` bool.
        """
        key, value = self.key_value.weight.unflatten(0, (2, self.heads, -1))
        scores = torch.einsum("nhd,hdk->nhk", query, key) @ memory.transpose(1, 2) / math.sqrt(query.shape[2])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(2)
        mixed = torch.einsum("nhk,hdk->nhd", weights @ memory, value)
        out: Tensor = self.out(mixed.flatten(1)[:, None])
        return out


_LEAST = 1e-30
"""Least probability of a copied code whose logarithm has a gradient."""


def _pooled(output: ForesightOutput, known: Tensor, pooling: HistoryPooling) -> Tensor:
    """Return I pooled over the runs that are known ``[n, L]``, as ``[n, dim]``."""
    history = output.history
    if pooling == "last":
        return history[:, -1]
    if pooling == "mean":
        return history.sum(1) / known.sum(1, keepdim=True).clamp(min=1)
    scores = (history @ output.future[:, :, None])[:, :, 0] / math.sqrt(history.shape[2])
    # A row without any run has zeros at all places, whatever their weights are.
    weights = scores.masked_fill(~(known | ~known.any(1, keepdim=True)), -torch.inf).softmax(1)
    return (weights[:, None] @ history)[:, 0]


def _log_rest(copied: Tensor) -> Tensor:
    """Return the logarithm of the probability that nothing is copied, ``[n]``."""
    return torch.log1p(-copied.sum(1).clamp(max=1 - 1e-6))
