"""The rows of a step in the parts over which gradients are accumulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trainer.data.loading.batch import RankingBatch


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive rows of a batch, as the dense network takes them.

    Attributes:
        embedded: lookup name -> ``[ids, dim]``, rows of its ids.
        lengths: lookup name -> ``[rows]``, ids of each row; only of lookups whose rows differ.
        dense: ``[rows, n_dense]``.
        label: ``[rows, behaviours]``.
        mask: ``[rows, behaviours]``.
        slow: ``[rows]``, see :class:`trainer.data.loading.batch.RankingBatch`.
    """

    embedded: dict[str, Tensor]
    lengths: dict[str, Tensor]
    dense: Tensor
    label: Tensor
    mask: Tensor
    slow: Tensor | None = None

    def gradient(self, name: str) -> Tensor:
        """Of the rows of a lookup; zero where the network does not use it."""
        gradient = self.embedded[name].grad
        return torch.zeros_like(self.embedded[name]) if gradient is None else gradient


def split_micro_batches(
    batch: RankingBatch, embedded: Mapping[str, Tensor], fixed_lengths: Mapping[str, int | None], parts: int
) -> list[MicroBatch]:
    """Cut a batch into ``parts`` parts whose rows differ by one at most; they share the batch's memory.

    Args:
        batch: as given to the engine.
        embedded: lookup name -> ``[ids, dim]``, rows of its ids or gradients of them; of all lookups or of some.
        fixed_lengths: lookup name -> ids of every row, or None where rows differ.
        parts: how many.
    """
    bounds = [batch.rows * part // parts for part in range(parts + 1)]
    lengths = row_lengths(batch, fixed_lengths)
    ends = {name: [0, len(rows)] for name, rows in embedded.items()}
    if parts > 1:
        for name, fixed in fixed_lengths.items():
            if fixed is None:
                # On a GPU this waits; it is needed only to accumulate gradients.
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
    """Lookup name -> ids of each row, ``[rows]`` int64; only of lookups whose rows differ."""
    return {
        name: of_key
        for keyed in batch.ids
        for name, of_key in zip(keyed.keys(), keyed.lengths().view(len(keyed.keys()), batch.rows), strict=True)
        if fixed_lengths[name] is None
    }
