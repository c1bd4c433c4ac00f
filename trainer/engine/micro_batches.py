"""Micro-batches of a step, over which gradients are accumulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modules.content import BatchVectors
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
        content: table of pre-trained vectors -> vectors of these rows.
    """

    embedded: dict[str, Tensor]
    lengths: dict[str, Tensor]
    dense: Tensor
    label: Tensor
    mask: Tensor
    slow: Tensor | None = None
    content: dict[str, BatchVectors] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the dense network; a model without pre-trained vectors has three."""
        inputs = (self.embedded, self.lengths, self.dense)
        return (*inputs, self.content) if self.content else inputs

    @property
    def has_all_sizes(self) -> bool:
        """True if it has two rows or more, and each lookup two ids or more."""
        return min(len(self.dense), *map(len, self.embedded.values())) > 1

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a lookup's rows, ``[ids, dim]``; zeros if the network does not use them."""
        gradient = self.embedded[name].grad
        return torch.zeros_like(self.embedded[name]) if gradient is None else gradient


def split_micro_batches(
    batch: RankingBatch,
    embedded: Mapping[str, Tensor],
    fixed_lengths: Mapping[str, int | None],
    parts: int,
    host: RankingBatch | None = None,
) -> list[MicroBatch]:
    """Split a batch into ``parts`` micro-batches whose sizes differ by at most one row; they share its memory.

    Args:
        batch: a batch of the engine.
        embedded: lookup name -> ``[ids, dim]``, looked-up rows of its ids or their gradients; of all or some lookups.
        fixed_lengths: lookup name -> number of ids of every row, or None for variable length.
        parts: number of micro-batches.
        host: the same batch on the host, where lengths are read without waiting for the device; None for ``batch``.
    """
    host = batch if host is None else host
    bounds = [batch.rows * part // parts for part in range(parts + 1)]
    lengths = row_lengths(batch, fixed_lengths)
    ends = {name: [0, len(rows)] for name, rows in embedded.items()}
    if parts > 1:
        host_lengths = row_lengths(host, fixed_lengths)
        for name, fixed in fixed_lengths.items():
            if fixed is None:
                ends[name] = torch.nn.functional.pad(host_lengths[name].cumsum(0), (1, 0))[bounds].tolist()
            else:
                ends[name] = [fixed * bound for bound in bounds]
        # Vectors that a device has found are there only, and it waits for their number in each part.
        content = _split_content(host if host.left is None else batch, host_lengths, bounds, batch.dense.device)
    else:
        content = [batch.content]
    return [
        MicroBatch(
            embedded={name: rows[ends[name][part] : ends[name][part + 1]] for name, rows in embedded.items()},
            lengths={name: of_key[start:stop] for name, of_key in lengths.items()},
            dense=batch.dense[start:stop],
            label=batch.label[start:stop],
            mask=batch.mask[start:stop],
            slow=None if batch.slow is None else batch.slow[start:stop],
            content=content[part],
        )
        for part, (start, stop) in enumerate(pairwise(bounds))
    ]


def _split_content(
    batch: RankingBatch, lengths: Mapping[str, Tensor], bounds: list[int], device: torch.device
) -> list[dict[str, BatchVectors]]:
    """Return the pre-trained vectors of each micro-batch, on ``device``; ``bounds`` are the micro-batches' edges."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    parts: list[dict[str, BatchVectors]] = [{} for _ in bounds[1:]]
    for name, of_table in batch.content.items():
        ends = {lookup: bounds for lookup in of_table.places}
        for lookup, key in of_table.entries.items():
            ends[lookup] = torch.nn.functional.pad(lengths[key].cumsum(0), (1, 0))[bounds].tolist()
        for part, of_part in enumerate(parts):
            own = of_table.part({lookup: (at[part], at[part + 1]) for lookup, at in ends.items()})
            of_part[name] = own.changed(move)
    return parts


def row_lengths(batch: RankingBatch, fixed_lengths: Mapping[str, int | None]) -> dict[str, Tensor]:
    """Return lookup name -> number of ids of each row, ``[rows]`` int64; only for lookups of variable length."""
    return {
        name: of_key
        for keyed in batch.ids
        for name, of_key in zip(keyed.keys(), keyed.lengths().view(len(keyed.keys()), batch.rows), strict=True)
        if fixed_lengths[name] is None
    }
