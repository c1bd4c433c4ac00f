"""Micro-batches of a step, over which gradients are accumulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trainer.data.loading.batch import RankingBatch


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive rows of a batch, in the form that the dense network takes.

    Attributes:
        embedded: lookup name -> ``[ids, dim]``, looked-up rows of its ids.
        lengths: lookup name -> ``[rows]``, number of ids of each row; only for lookups of variable length.
        dense: ``[rows, n_dense]``.
        label: ``[rows, behaviours]``.
        mask: ``[rows, behaviours]``.
        slow: ``[rows]`` or None, see :class:`trainer.data.loading.batch.RankingBatch`.
    """

    embedded: dict[str, Tensor]
    lengths: dict[str, Tensor]
    dense: Tensor
    label: Tensor
    mask: Tensor
    slow: Tensor | None = None

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a lookup's rows, ``[ids, dim]``; zeros if the network does not use them."""
        gradient = self.embedded[name].grad
        return torch.zeros_like(self.embedded[name]) if gradient is None else gradient


def split_micro_batches(
    batch: RankingBatch, embedded: Mapping[str, Tensor], fixed_lengths: Mapping[str, int | None], parts: int
) -> list[MicroBatch]:
    """Split a batch into ``parts`` micro-batches whose sizes differ by at most one row; they share its memory.

    Args:
        batch: a batch of the engine.
        embedded: lookup name -> ``[ids, dim]``, looked-up rows of its ids or their gradients; of all or some lookups.
        fixed_lengths: lookup name -> number of ids of every row, or None for variable length.
        parts: number of micro-batches.
    """
    bounds = [batch.rows * part // parts for part in range(parts + 1)]
    lengths = row_lengths(batch, fixed_lengths)
    ends = {name: [0, len(rows)] for name, rows in embedded.items()}
    if parts > 1:
        for name, fixed in fixed_lengths.items():
            if fixed is None:
                # ``tolist`` waits for the GPU, so this runs only if gradients are accumulated.
                ends[name] = torch.nn.functional.pad(lengths[name].cumsum(0), (1, 0))[bounds].tolist()
            else:
                ends[name] = [fixed * bound for bound in bounds]
    return [
        MicroBatch(
            embedded={name: rows[ends[name][part] : ends[name][part + 1]] for name, rows in embedded.items()},
            lengths={name: of_key[start:stop] for name, of_key in lengths.items()},
            dense=batch.dense[start:stop],
            label=batch.label[start:stop],
            mask=batch.mask[start:stop],
            slow=None if batch.slow is None else batch.slow[start:stop],
        )
        for part, (start, stop) in enumerate(pairwise(bounds))
    ]


def row_lengths(batch: RankingBatch, fixed_lengths: Mapping[str, int | None]) -> dict[str, Tensor]:
    """Return lookup name -> number of ids of each row, ``[rows]`` int64; only for lookups of variable length."""
    return {
        name: of_key
        for keyed in batch.ids
        for name, of_key in zip(keyed.keys(), keyed.lengths().view(len(keyed.keys()), batch.rows), strict=True)
        if fixed_lengths[name] is None
    }
