"""Two towers of LARM's alignment (section 3.3): a user, and an author whose id is fused with what is on air.

The author's tower has two parts. One reads content: the mean of the author's segment vectors and the latest of them.
The other reads the author's features, among them the embedding of the id. A gate that reads the id alone mixes them::

    content     a_LLM: MLP([mean ; latest])
    features    a_Rec: MLP(author features with the id)
    gate        g: sigmoid(MLP(id))
    author      g a_LLM + (1 - g) a_Rec
    user        MLP(user features)

Both towers return unit vectors, and the loss is an in-batch softmax over their products. The paper has no numbers for
widths, temperature and correction; all of them are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.pooling import mean_by_row

AuthorParts = Literal["fused", "features", "content"]
"""Parts of the author's tower: both with the gate, or one of them alone."""

HistoryPooling = Literal["mean", "latest"]

SCORE_BYTES = 32
"""Upper bound of the memory of one score of a row with another one, in float32 (measured)."""


@dataclass(frozen=True)
class TowerInputs:
    """Places of the inputs of both towers in a batch.

    Attributes:
        user_lookups: lookups of fixed length that the user's tower reads whole.
        user_ids: lookup of fixed length -> indices of its ids that the user's tower reads.
        user_dense: columns of the dense features that the user's tower reads.
        histories: for each history, its lookups of variable length; the first one has one id for each entry.
        author_id: lookup of the author's id.
        author_ids: lookup of fixed length -> indices of its ids that the author's tower reads.
        author_dense: columns of the dense features that the author's tower reads.
        content: first column of the content: mean, latest vector, 1 for an author with a segment, 1 for an author whose
            gate reads the id.
        vector_dim: number of elements of a segment vector.
    """

    user_lookups: tuple[str, ...]
    user_ids: Mapping[str, tuple[int, ...]]
    user_dense: tuple[int, ...]
    histories: tuple[tuple[str, ...], ...]
    author_id: str
    author_ids: Mapping[str, tuple[int, ...]]
    author_dense: tuple[int, ...]
    content: int
    vector_dim: int


class AuthorFusion(nn.Module):
    """Author's tower: content and features, mixed by a gate.

    Args:
        content: width of the content.
        features: width of the author's features, with the embedding of the id.
        id_dim: width of the embedding of the id.
        widths: hidden widths of both parts.
        gate: hidden widths of the gate.
        out_features: width of the result.
        parts: ``fused``; one part alone has no gate.
    """

    def __init__(
        self,
        content: int,
        features: int,
        id_dim: int,
        widths: Sequence[int],
        gate: Sequence[int],
        out_features: int,
        parts: AuthorParts = "fused",
    ) -> None:
        super().__init__()
        self.content = None if parts == "features" else make_mlp(content, widths, out_features)
        self.features = None if parts == "content" else make_mlp(features, widths, out_features)
        self.gate = make_mlp(id_dim, gate, 1) if parts == "fused" else None

    def forward(
        self, content: Tensor, features: Tensor, id_embedding: Tensor, has_content: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the fused vectors ``[n, out_features]`` and the shares of the content in them, ``[n]``.

        Args:
            content: ``[n, content]``.
            features: ``[n, features]``.
            id_embedding: ``[n, id_dim]``.
            has_content: ``[n]`` bool; an author without a segment has the share 0.
            known: ``[n]`` bool, True for authors whose id, or the unknown id in its place, was trained on. Others have
                the share 1, since an untrained row says nothing about them.
        """
        if self.features is None:
            assert self.content is not None
            return self.content(content), torch.ones_like(content[:, 0])
        of_features = self.features(features)
        if self.content is None or self.gate is None:
            return of_features, torch.zeros_like(of_features[:, 0])
        share = torch.sigmoid(self.gate(id_embedding)[:, 0])
        share = share.where(has_content, share.new_zeros(())).where(known, share.new_ones(()))
        return share[:, None] * self.content(content) + (1 - share[:, None]) * of_features, share


class TwoTowers(nn.Module):
    """Both towers over the looked-up rows of a batch.

    Args:
        inputs: places of the inputs.
        dims: lookup -> width of one of its ids.
        entry_widths: lookup of a history -> width of an entry.
        lengths: lookup of fixed length -> number of ids of a row.
        dim: width of the vectors.
        user_widths: hidden widths of the user's tower.
        author_widths: hidden widths of both parts of the author's tower.
        gate_widths: hidden widths of the gate.
        parts: see :class:`AuthorFusion`.
        pooling: ``mean`` of a history's entries, or the ``latest`` entry.
    """

    def __init__(
        self,
        inputs: TowerInputs,
        dims: Mapping[str, int],
        entry_widths: Mapping[str, int],
        lengths: Mapping[str, int],
        *,
        dim: int,
        user_widths: Sequence[int],
        author_widths: Sequence[int],
        gate_widths: Sequence[int],
        parts: AuthorParts = "fused",
        pooling: HistoryPooling = "mean",
    ) -> None:
        super().__init__()
        self.inputs, self.pooling, self.dim = inputs, pooling, dim
        self._dims, self._entry_widths, self._lengths = dict(dims), dict(entry_widths), dict(lengths)
        user = sum(dims[name] * lengths[name] for name in inputs.user_lookups)
        user += sum(dims[name] * len(places) for name, places in inputs.user_ids.items())
        user += sum(entry_widths[name] for history in inputs.histories for name in history) + len(inputs.user_dense)
        author = dims[inputs.author_id] * lengths[inputs.author_id]
        author += sum(dims[name] * len(places) for name, places in inputs.author_ids.items())
        self.user = make_mlp(user, user_widths, dim)
        self.author = AuthorFusion(
            2 * inputs.vector_dim + 1,
            author + len(inputs.author_dense),
            dims[inputs.author_id],
            author_widths,
            gate_widths,
            dim,
            parts,
        )

    def forward(self, embedded: Mapping[str, Tensor], lengths: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Return ``[batch, 2 * dim + 1]`` float32: user vector, author vector and share of the content in the author's.

        The vectors have length 1. A batch may be empty; then every parameter gets a gradient of zeros.

        Args:
            embedded: lookup name -> values ``[ids, width]`` of all rows, one row after another.
            lengths: lookup name -> number of ids of each row, ``[batch]`` int64, for lookups of variable length.
            dense: ``[batch, n]``, dense features and then the content; see :class:`TowerInputs`.
        """
        dtype = next(self.parameters()).dtype
        inputs, rows = self.inputs, len(dense)

        def ids_of(chosen: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
            return [
                take_columns(embedded[name].view(rows, self._lengths[name], self._dims[name]), places).flatten(1)
                for name, places in chosen.items()
            ]

        histories = [
            self._pool(embedded[name], lengths[history[0]], self._entry_widths[name])
            for history in inputs.histories
            for name in history
        ]
        user = [self._whole(name, embedded[name], rows) for name in inputs.user_lookups]
        user += ids_of(inputs.user_ids) + histories
        user.append(take_columns(dense, inputs.user_dense))
        author_id = self._whole(inputs.author_id, embedded[inputs.author_id], rows)
        features = [author_id, *ids_of(inputs.author_ids), take_columns(dense, inputs.author_dense)]
        stop = inputs.content + 2 * inputs.vector_dim + 1
        fused, share = self.author(
            dense[:, inputs.content : stop].to(dtype),
            torch.cat(features, 1).to(dtype),
            author_id.to(dtype),
            dense[:, stop - 1] > 0,
            dense[:, stop] > 0,
        )
        vectors = (self.user(torch.cat(user, 1).to(dtype)), fused)
        return torch.cat([*(functional.normalize(part.float(), dim=1) for part in vectors), share.float()[:, None]], 1)

    def _whole(self, name: str, values: Tensor, rows: int) -> Tensor:
        """Return the values of a lookup of fixed length, ``[rows, width]``."""
        return values.view(rows, self._lengths[name] * self._dims[name])

    def _pool(self, values: Tensor, count: Tensor, width: int) -> Tensor:
        """Return the entries ``[sum of count, width]`` of each row as one vector, ``[batch, width]``; 0 without any."""
        entries = values.view(-1, width)
        if self.pooling == "mean":
            return mean_by_row(entries, count)
        # Entries are in order of time, so the latest one of a row is its last.
        empty = entries.new_zeros(1, width)
        last = torch.where(count > 0, count.cumsum(0), 0)
        return torch.cat([empty, entries]).index_select(0, last)


def take_columns(values: Tensor, places: Sequence[int]) -> Tensor:
    """Return the columns of ``[n, columns, ...]`` at some places, in the order of these.

    An index of Python numbers would be copied to the device, for which the host waits.
    """
    starts = [at for at, place in enumerate(places) if not at or place != places[at - 1] + 1]
    bounds = pairwise([*starts, len(places)])
    return torch.cat([values[:, :0], *(values[:, places[start] : places[stop - 1] + 1] for start, stop in bounds)], 1)


def make_mlp(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Return linear layers with a ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, out in pairwise((in_features, *widths, out_features)):
        layers += [nn.Linear(fan_in, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def in_batch_softmax(
    user: Tensor,
    author: Tensor,
    log_q: Tensor,
    user_id: Tensor,
    author_id: Tensor,
    rows: slice,
    temperature: float,
    budget_bytes: int = 1 << 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the in-batch softmax loss of some rows of positive pairs, and its gradients.

    The loss of row i, whose user is u_i and whose author is a_i, is

        - log( exp(s_ii) / sum_j exp(s_ij) ),     s_ij = u_i a_j / temperature - log Q_j

    where j is i itself and every row whose author is no positive of the same user in the batch: neither the same author
    in another row, nor another author of the user, is a negative. ``Q_j`` is the probability that author j is in a
    batch. Negatives come in proportion to it; the correction makes ``u_i a_j / temperature`` an estimate of
    ``log P(a_j | u_i)``, up to a constant of the user (Yi et al., RecSys 2019). Without it, popular authors would be
    pushed away more often.

    If the batch is distributed over ranks, each rank calls this with the whole batch and its own ``rows``. The
    gradients of ``author``, summed over the ranks, are then those of the whole batch.

    Args:
        user, author: ``[batch, dim]`` float.
        log_q: ``[batch]``, log Q of each row's author; zeros for no correction.
        user_id, author_id: ``[batch]`` int64.
        rows: rows whose loss is returned; the negatives are those of the whole batch.
        temperature: above 0.
        budget_bytes: memory of the scores that are held at the same time; a chunk has at least one row, which takes
            :data:`SCORE_BYTES` ``* batch`` bytes.

    Returns:
        The loss summed over the rows, a scalar in nats; the gradient of ``user[rows]``; the gradient of ``author``.
    """
    batch = len(user)
    start, stop, _ = rows.indices(batch)
    chunk = max(1, budget_bytes // max(1, SCORE_BYTES * batch))
    loss, of_author = user.new_zeros(()), torch.zeros_like(author)
    of_user = torch.zeros_like(user[rows])
    positives = _Positives(user_id, author_id)
    for first in range(start, stop, chunk):
        place = torch.arange(first, min(first + chunk, stop), device=user.device)
        line = torch.arange(len(place), device=user.device)
        scores = user[place] @ author.t() / temperature - log_q
        own = scores[line, place]
        excluded = positives.of_rows(place)
        excluded[line, place] = False
        scores.masked_fill_(excluded, -torch.inf)
        loss = loss + (scores.logsumexp(1) - own).sum()
        gradient = scores.softmax(1)
        gradient[line, place] -= 1
        gradient /= temperature
        of_user[place - start] = gradient @ author
        of_author.addmm_(gradient.t(), user[place])
    return loss, of_user, of_author


class _Positives:
    """Pairs of a user and an author that are positive in a batch.

    Users and authors are numbered by their first place among the sorted ids. The numbers of distinct ids would be
    smaller, but the host would wait for a GPU to learn how many there are.
    """

    def __init__(self, user_id: Tensor, author_id: Tensor) -> None:
        self._user = user_id
        self._author = torch.searchsorted(author_id.sort().values, author_id)

    def of_rows(self, place: Tensor) -> Tensor:
        """Return True where the author of a row is a positive of the user of ``place``, ``[len(place), batch]``."""
        own = self._user[place]
        users = own.sort().values
        # A table of these users alone: one of all users and authors of a batch would be as large as all scores. Rows of
        # other users are written to a spare line.
        at = torch.searchsorted(users, self._user)
        listed = users[at.clamp(max=len(place) - 1)] == self._user
        table = torch.zeros(len(place) + 1, len(self._user), dtype=torch.bool, device=place.device)
        table[at.where(listed, len(place)), self._author] = True
        return table[torch.searchsorted(users, own)][:, self._author]
