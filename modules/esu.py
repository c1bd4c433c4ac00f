"""Exact search unit (ESU): multi-head target attention of a candidate over the entries that the searches found.

One unit reads each retrieved sequence (Moment&Cross, equation 7): ``softmax(q W_q (k W_k)^T / sqrt(d)) k W_v``, with
heads as in TWIN (Chang et al., KDD 2023). One call computes all sequences.

No entry is ever projected. Since ``q W_q (k W_k)^T = (q W_q W_k^T) k^T``, the candidate is projected into the space of
the entries once for each row, and ``W_v`` is applied to the weighted sum of the entries. An entry of width D then costs
``2 D`` multiplications for each head, whatever the width d of the heads, instead of ``2 D d``.
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
"""Parts of the entries of a sequence, which are joined as columns: ``[entries, dim]`` each, one row after another."""


class SequenceAttention(nn.Module):
    """Multi-head target attention over several sequences of one layout, each with its own weights.

    A score is the product of candidate and entry plus a learnt number for the entry's place, counted from the end of
    its row, where the newest entries are. As an option, cross features, which belong to the pair of user and entry (its
    age, the user's behaviours), are split off as in TWIN: they take no part in the product, and add the term
    ``k_c w_c`` to the score, which is independent of the candidate. ``w_c`` is the paper's projection to a scalar times
    its weight, which are only learnt as one product. Without the option an entry's age is a part of its key.

    Columns of candidate and entry that hold the same feature from the same table (author and author) are also compared
    directly: ``sum_c w_c q_c k_c`` is added to the score, where ``w_c`` is learnt and starts at one. So attention
    starts with entries similar to the candidate, which is also the meaning of a search by dot product. ``W_q W_k^T``
    starts at random and needs many more rows to learn that equal features match.

    Beside its weighted sum a head returns its mass ``log(1 + sum of exp(score))`` over the entries. Softmax loses this
    information: one entry that fits badly gets the same total weight as twenty that fit well. The mass is 0 for a row
    without entries.

    There is no matrix after the heads are joined, because the layer that reads them is linear.

    Args:
        query_dim: width of the candidate's features.
        part_dims: widths of the parts of an entry.
        max_lengths: largest number of entries of a row, for each sequence.
        heads: H, number of heads.
        head_dim: d, width of a head.
        cross_parts: number of parts, at the end, that are cross features; 0 for no split.
        alike: pairs of a column of the candidate and a column of an entry that hold the same feature; each column of an
            entry occurs at most once, and no column of a cross feature does.

    Attributes:
        out_features: width of the output for each sequence, ``H * (d + 1)``.

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
            sequences: parts of each sequence, of any floating type.
            lengths: for each sequence the number of entries of each row, ``[batch]`` int64, at most its ``max_length``.

        Returns:
            ``[batch, sequences * out_features]``: for each sequence and head its sum and its mass; zeros for a row
            without entries.
        """
        parts = [part for sequence in sequences for part in sequence]
        projected = self._project(query)
        pooled, mass = _Attend.apply(projected, self.place, self.max_lengths, tuple(lengths), *parts)
        sums = torch.matmul(pooled.transpose(1, 2), self.value)  # [sequences, heads, batch, head_dim]
        joined = torch.cat([sums, mass.transpose(1, 2)[..., None]], 3)
        return joined.permute(2, 0, 1, 3).flatten(1)

    def attention_weights(self, query: Tensor, sequences: Sequence[Parts], lengths: Sequence[Tensor]) -> list[Tensor]:
        """Return the attention weights of the entries, for each sequence ``[entries, heads]``.

        The weights of a row sum to 1 for each head. This is slow and meant for few rows; the arguments are those of
        :meth:`forward`.
        """
        projected, weights = self._project(query), []
        for index, (sequence, of_row) in enumerate(zip(sequences, lengths, strict=True)):
            keys = torch.cat(list(sequence), 1).to(query.dtype)
            by_row, first = [keys.new_zeros(0, self.heads)], 0
            for row, length in enumerate(of_row.tolist()):
                scores = keys[first : first + length] @ projected[index, row].t()
                places = self.place[index, :, self.place.shape[2] - length :].t()
                by_row.append((scores + places).softmax(0))
                first += length
            weights.append(torch.cat(by_row))
        return weights

    def _project(self, query: Tensor) -> Tensor:
        """Project the candidate into the space of the entries, ``[sequences, batch, heads, key_dim]``."""
        sequences, heads, head_dim, _ = self.key.shape
        by_head = torch.matmul(query / math.sqrt(head_dim), self.query).view(sequences, -1, heads, head_dim)
        projected = torch.matmul(by_head.transpose(1, 2), self.key).transpose(1, 2)
        if self.alike is not None:
            same_features = query[:, None, self.of_query] * self.alike[:, None]
            projected = projected.index_add(3, self.of_key, same_features)
        if self.cross is None:
            return projected
        # The score of the cross features does not depend on the candidate: their columns are the weights themselves.
        return torch.cat([projected, self.cross[:, None].expand(-1, len(query), -1, -1)], 3)


class _Attend(torch.autograd.Function):
    """Weighted sums of entries, computed block by block, with its own backward pass.

    The parts of the entries are never copied as a whole: a block joins the parts of its own entries when it needs them,
    in both passes, so there is no joined or padded copy of all entries. The weights are kept for the backward pass,
    ``4 * heads`` bytes for each entry in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        place: Tensor,
        max_lengths: tuple[int, ...],
        lengths: tuple[Tensor, ...],
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sums of the entries and the mass of each head.

        Args:
            ctx: context of autograd.
            projected: candidates ``[sequences, batch, heads, dim]``.
            place: ``[sequences, heads, places]``, added to the scores.
            max_lengths: largest number of entries of a row, for each sequence.
            lengths: for each sequence the number of entries of each row, ``[batch]`` int64.
            parts: parts of the entries, sequence by sequence.

        Returns:
            Sums ``[sequences, batch, heads, dim]`` and masses ``[sequences, batch, heads]``.
        """
        sequences, _, heads, dim = projected.shape
        each = len(parts) // sequences
        out, kept = torch.zeros_like(projected), []
        mass = projected.new_zeros(projected.shape[:3])
        for index in range(sequences):
            own = parts[index * each : (index + 1) * each]
            for block in cut_rows(
                lengths[index], len(own[0]), max_lengths[index], 2 * heads * dim, 2 * dim + 2 * heads
            ):
                keys = _join(own, block, projected.dtype)
                scores = torch.bmm(take(projected[index], block.rows), keys.transpose(1, 2))
                scores += place[index, :, place.shape[2] - block.length :]
                if block.padding is not None:
                    scores.masked_fill_(block.padding[:, None], torch.finfo(scores.dtype).min)
                share = scores.softmax(2)
                mass[index, block.rows] = functional.softplus(scores.logsumexp(2))
                if block.padding is not None:
                    # The softmax of a row without entries gives weight to its padding.
                    share.masked_fill_(block.padding[:, None], 0)
                out[index, block.rows] = torch.bmm(share, keys)
                kept.append((index, block, share))
        ctx.save_for_backward(projected, place, mass, *parts)
        ctx.kept = kept
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of ``forward``."""
        projected, place, mass, *parts = ctx.saved_tensors
        each = len(parts) // len(projected)
        # log(1 + sum exp s) has the slope share * (1 - 1 / (1 + sum exp s)) in each score s.
        grad_mass = grad_mass * -torch.expm1(-mass)
        grad_projected = torch.zeros_like(projected)
        grad_place = torch.zeros(
            place.shape, dtype=torch.promote_types(place.dtype, torch.float32), device=place.device
        )
        # One entry more than there are: the gradients of padding are written there and dropped.
        grad_parts = [part.new_zeros(len(part) + 1, part.shape[1]) for part in parts]
        for index, block, share in ctx.kept:
            own = slice(index * each, (index + 1) * each)
            keys, query = _join(parts[own], block, projected.dtype), take(projected[index], block.rows)
            grad = take(grad_out[index], block.rows)
            grad_share = torch.bmm(grad, keys.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_share, share, 2, share.dtype)
            grad_scores += share * take(grad_mass[index], block.rows)[..., None]
            grad_place[index, :, place.shape[2] - block.length :] += grad_scores.sum(0)
            grad_projected[index, block.rows] = torch.bmm(grad_scores, keys)
            # Keys occur in the scores and in the weighted sum: one product adds both gradients.
            grad_keys = torch.bmm(torch.cat([grad_scores, share], 1).transpose(1, 2), torch.cat([query, grad], 1))
            _write_back(grad_parts[own], block, grad_keys)
        without_padding = [gradient[:-1] for gradient in grad_parts]
        return grad_projected, grad_place.to(place.dtype), None, None, *without_padding


def _join(parts: Sequence[Tensor], block: Block, dtype: torch.dtype) -> Tensor:
    """Return the block's entries with their parts joined, ``[rows, length, dim]``."""
    return torch.cat([take(part, block.entries) for part in parts], 1).to(dtype).view(-1, block.length, _width(parts))


def _write_back(parts: Sequence[Tensor], block: Block, values: Tensor) -> None:
    """Write values of the block's entries, ``[rows, length, dim]``, to the places of these entries in the parts."""
    entries = block.targets(len(parts[0]) - 1)
    columns = values.flatten(0, 1).split([part.shape[1] for part in parts], 1)
    for part, of_part in zip(parts, columns, strict=True):
        part[entries] = of_part.to(part.dtype)


def _width(parts: Sequence[Tensor]) -> int:
    """Return the width of an entry whose parts are joined."""
    return sum(part.shape[1] for part in parts)


def _weights(*shape: int, fan_in: int) -> nn.Parameter:
    """Return weights with the uniform initial values of ``nn.Linear``."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
