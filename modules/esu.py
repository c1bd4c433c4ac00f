"""Exact search unit (ESU): multi-head target attention of a candidate over the entries that searches have kept.

One unit reads each retrieved sequence (Moment&Cross, equation 7): ``softmax(q W_q (k W_k)^T / sqrt(d)) k W_v``, with
heads as in TWIN (Chang et al., KDD 2023). All sequences are one call.

No entry is ever projected. Since ``q W_q (k W_k)^T = (q W_q W_k^T) k^T``, the candidate is brought into the space of
the entries once a row, and what ``W_v`` is applied to is the weighted sum of the entries: an entry of width D costs
``2 D`` multiplications a head, whatever the width of the heads, instead of ``2 D d``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modules.blocks import Block, cut_rows, take

Parts = Sequence[Tensor]
"""What describes the entries of a sequence, side by side: ``[entries, dim]`` each, all rows one after another."""


class SequenceAttention(nn.Module):
    """Multi-head target attention over several sequences of one layout, each with weights of its own.

    A score has two parts beside the product of candidate and entry: a learnt number for the entry's place, counted
    from the end of its row, where the newest stand; and, as an option, TWIN's for cross features, which are of the pair
    of user and entry (its age, what the user did). Those then add ``k_c w_c`` to the score, whatever the candidate, and
    take no part in the product; ``w_c`` is the paper's projection to a scalar times its weight, which are only learnt
    as one product. Without the option an entry's age is a part of its key.

    Columns of candidate and entry that are read from the same table and mean the same (author and author) are also
    compared as they are: ``sum_c w_c q_c k_c`` is added to the score, with ``w_c`` learnt from one on. So attention
    begins with what is like the candidate, which is what a search by dot product means. ``W_q W_k^T`` begins at random,
    and finds out that equal is like equal only after many more rows.

    Beside its weighted sum a head says how much it found: ``log(1 + sum of exp(score))`` over the entries. Softmax
    forgets that: one entry that fits badly gets as much as twenty that fit well. It is 0 where there are none.

    There is no matrix after the heads are joined: the layer that reads them is linear.

    Args:
        query_dim: width of the candidate's features.
        part_dims: widths of the parts of an entry.
        max_lengths: longest row of each sequence.
        heads: H.
        head_dim: d, width of a head.
        cross_parts: how many of the parts, the last ones, are cross features; 0 is no split.
        alike: pairs of a column of the candidate and a column of an entry that mean the same; each column of an entry
            at most once, and none of a cross feature.

    Attributes:
        out_features: width of what is returned for each sequence, ``H * (d + 1)``.

    Raises:
        ValueError: no part is left for the product, or ``alike`` names a column twice or one of a cross feature.
    """

    of_query: Tensor
    of_key: Tensor

    def __init__(
        self,
        query_dim: int,
        part_dims: Sequence[int],
        max_lengths: Sequence[int],
        heads: int = 4,
        head_dim: int = 16,
        cross_parts: int = 0,
        alike: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        if not 0 <= cross_parts < len(part_dims):
            raise ValueError(f"{cross_parts} of {len(part_dims)} parts of an entry cannot be cross features")
        sequences, key_dim = len(max_lengths), sum(part_dims)
        item_dim = sum(part_dims[: len(part_dims) - cross_parts])
        of_query, of_key = [pair[0] for pair in alike], [pair[1] for pair in alike]
        if len(set(of_key)) < len(of_key) or max(of_key, default=-1) >= item_dim:
            raise ValueError(f"columns {of_key} of an entry of {item_dim} cannot be compared with the candidate's")
        self.max_lengths, self.heads, self.out_features = tuple(max_lengths), heads, heads * (head_dim + 1)
        self.query = _weights(sequences, query_dim, heads * head_dim, fan_in=query_dim)
        self.key = _weights(sequences, heads, head_dim, item_dim, fan_in=item_dim)
        self.value = _weights(sequences, heads, key_dim, head_dim, fan_in=key_dim)
        self.cross = nn.Parameter(torch.zeros(sequences, heads, key_dim - item_dim)) if cross_parts else None
        self.alike = nn.Parameter(torch.ones(sequences, heads, len(alike))) if alike else None
        self.register_buffer("of_query", torch.tensor(of_query, dtype=torch.int64), persistent=False)
        self.register_buffer("of_key", torch.tensor(of_key, dtype=torch.int64), persistent=False)
        self.place = nn.Parameter(torch.zeros(sequences, heads, max(max_lengths)))

    def forward(self, query: Tensor, sequences: Sequence[Parts], lengths: Sequence[Tensor]) -> Tensor:
        """Attend to each row's entries of each sequence.

        Args:
            query: ``[batch, query_dim]``, of the parameters' type.
            sequences: parts of each, of any floating type.
            lengths: for each sequence the entries of each row, ``[batch]`` int64, each at most its ``max_length``.

        Returns:
            ``[batch, sequences * out_features]``, sequence by sequence, in each head by head its sum and how much it
            found; zeros where a row has no entries.
        """
        parts = [part for sequence in sequences for part in sequence]
        looking_for = self._looking_for(query)
        pooled, mass = _Attend.apply(looking_for, self.place, self.max_lengths, tuple(lengths), *parts)
        found = torch.matmul(pooled.transpose(1, 2), self.value)  # [sequences, heads, batch, head_dim]
        found = torch.cat([found, mass.transpose(1, 2)[..., None]], 3)
        return found.permute(2, 0, 1, 3).flatten(1)

    def attention_weights(self, query: Tensor, sequences: Sequence[Parts], lengths: Sequence[Tensor]) -> list[Tensor]:
        """How much attention each entry gets, for each sequence ``[entries, heads]``: 1 in all for a row and head.

        For looking at few rows; arguments as of :meth:`forward`.
        """
        looking_for, found = self._looking_for(query), []
        for index, (sequence, of_row) in enumerate(zip(sequences, lengths, strict=True)):
            keys = torch.cat(list(sequence), 1).to(query.dtype)
            shares, first = [keys.new_zeros(0, self.heads)], 0
            for row, length in enumerate(of_row.tolist()):
                scores = keys[first : first + length] @ looking_for[index, row].t()
                places = self.place[index, :, self.place.shape[2] - length :].t()
                shares.append((scores + places).softmax(0))
                first += length
            found.append(torch.cat(shares))
        return found

    def _looking_for(self, query: Tensor) -> Tensor:
        """The candidate in the space of the entries, ``[sequences, batch, heads, key_dim]``."""
        sequences, heads, head_dim, _ = self.key.shape
        projected = torch.matmul(query / math.sqrt(head_dim), self.query).view(sequences, -1, heads, head_dim)
        looking_for = torch.matmul(projected.transpose(1, 2), self.key).transpose(1, 2)
        if self.alike is not None:
            asked = query[:, None, self.of_query] * self.alike[:, None]
            looking_for = looking_for.index_add(3, self.of_key, asked)
        if self.cross is None:
            return looking_for
        return torch.cat([looking_for, self.cross[:, None].expand(-1, len(query), -1, -1)], 3)


class _Attend(torch.autograd.Function):
    """Weighted sums of entries, block by block, its backward pass written out.

    The entries stay where they are: a block puts its own side by side when it needs them, in both passes, so that no
    joined or padded copy of all of them is ever made. Kept are the weights, ``4 * heads`` bytes an entry in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        looking_for: Tensor,
        place: Tensor,
        max_lengths: tuple[int, ...],
        lengths: tuple[Tensor, ...],
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``looking_for [sequences, batch, heads, dim]``, ``place [sequences, heads, places]`` -> sums as the first,
        and ``[sequences, batch, heads]``."""
        sequences, _, heads, dim = looking_for.shape
        each = len(parts) // sequences
        out, kept = torch.zeros_like(looking_for), []
        mass = looking_for.new_zeros(looking_for.shape[:3])
        for index in range(sequences):
            own = parts[index * each : (index + 1) * each]
            for block in cut_rows(
                lengths[index], len(own[0]), max_lengths[index], 2 * heads * dim, 2 * dim + 2 * heads
            ):
                keys = _join(own, block, looking_for.dtype)
                scores = torch.bmm(take(looking_for[index], block.rows), keys.transpose(1, 2))
                scores += place[index, :, place.shape[2] - block.length :]
                if block.padding is not None:
                    scores.masked_fill_(block.padding[:, None], torch.finfo(scores.dtype).min)
                share = scores.softmax(2)
                mass[index, block.rows] = functional.softplus(scores.logsumexp(2))
                if block.padding is not None:
                    # A row without entries shares out among its padding.
                    share.masked_fill_(block.padding[:, None], 0)
                out[index, block.rows] = torch.bmm(share, keys)
                kept.append((index, block, share))
        ctx.save_for_backward(looking_for, place, mass, *parts)
        ctx.kept = kept
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors that were given to ``forward``."""
        looking_for, place, mass, *parts = ctx.saved_tensors
        each = len(parts) // len(looking_for)
        # log(1 + sum exp s) has the slope share * (1 - 1 / (1 + sum exp s)) in each score s.
        grad_mass = grad_mass * -torch.expm1(-mass)
        grad_looking_for = torch.zeros_like(looking_for)
        grad_place = torch.zeros(
            place.shape, dtype=torch.promote_types(place.dtype, torch.float32), device=place.device
        )
        # One entry more: places that are padding write there.
        grad_parts = [part.new_zeros(len(part) + 1, part.shape[1]) for part in parts]
        for index, block, share in ctx.kept:
            own = slice(index * each, (index + 1) * each)
            keys, asked = _join(parts[own], block, looking_for.dtype), take(looking_for[index], block.rows)
            grad = take(grad_out[index], block.rows)
            grad_share = torch.bmm(grad, keys.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_share, share, 2, share.dtype)
            grad_scores += share * take(grad_mass[index], block.rows)[..., None]
            grad_place[index, :, place.shape[2] - block.length :] += grad_scores.sum(0)
            grad_looking_for[index, block.rows] = torch.bmm(grad_scores, keys)
            grad_keys = torch.bmm(torch.cat([grad_scores, share], 1).transpose(1, 2), torch.cat([asked, grad], 1))
            _give(grad_parts[own], block, grad_keys)
        given = [gradient[:-1] for gradient in grad_parts]
        return grad_looking_for, grad_place.to(place.dtype), None, None, *given


def _join(parts: Sequence[Tensor], block: Block, dtype: torch.dtype) -> Tensor:
    """The block's entries, ``[rows, length, dim]``."""
    return torch.cat([take(part, block.entries) for part in parts], 1).to(dtype).view(-1, block.length, _width(parts))


def _give(parts: Sequence[Tensor], block: Block, values: Tensor) -> None:
    """Write what belongs to the block's entries, ``[rows, length, dim]``, back to where they are."""
    entries = block.entries
    if block.padding is not None:
        assert isinstance(entries, Tensor)
        entries = entries.masked_fill(block.padding.flatten(), len(parts[0]) - 1)
    pieces = values.flatten(0, 1).split([part.shape[1] for part in parts], 1)
    for part, piece in zip(parts, pieces, strict=True):
        part[entries] = piece.to(part.dtype)


def _width(parts: Sequence[Tensor]) -> int:
    return sum(part.shape[1] for part in parts)


def _weights(*shape: int, fan_in: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
