"""Batches as two flat buffers, in which they travel between processes, and the layout of these buffers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class BatchLayout:
    """Layout of the batches, which sender and receiver both know.

    Attributes:
        keys: for each embedding dimension, the names of its lookups.
        n_dense: number of columns of ``dense``.
        behaviours: number of columns of ``label`` and ``mask``.
    """

    keys: tuple[tuple[str, ...], ...]
    n_dense: int
    behaviours: int

    def integer_sizes(self, rows: int, ids_per_key: dict[str, int]) -> list[int]:
        """Return the lengths of the parts of :attr:`PackedBatch.integers`, in order."""
        sizes: list[int] = []
        for keys in self.keys:
            sizes += [ids_per_key[key] for key in keys]
            sizes.append(len(keys) * rows)
        return [*sizes, rows, rows, rows]

    def float_sizes(self, rows: int) -> list[int]:
        """Return the lengths of the parts of :attr:`PackedBatch.floats`, in order."""
        return [rows * self.n_dense, rows * self.behaviours, rows * self.behaviours]


class PackedIds(NamedTuple):
    """Ids of one embedding dimension, as views of a packed batch.

    Attributes:
        keys: names of the lookups.
        values: ids, key by key, ``[ids]`` int64.
        lengths: number of ids of each row, key by key, ``[keys * rows]`` int64.
        offsets: position in ``values`` where the ids of each key begin, and the end of the last.
    """

    keys: tuple[str, ...]
    values: Tensor
    lengths: Tensor
    offsets: list[int]


@dataclass(frozen=True)
class PackedBatch:
    """A batch as two flat tensors, so that a worker process hands over only two handles, whatever the features are.

    Attributes:
        integers: int64. For each embedding dimension, the ids key by key and then the lengths key by key; at the end
            ``user_id``, ``visit_id`` and ``request_ms``.
        floats: float32. ``dense``, ``label`` and ``mask``, each row by row.
        rows: number of rows.
        ids_per_key: lookup name -> number of ids.
        skipped_rows: see :class:`trainer.data.loading.batch.RankingBatch`.
        beyond: see :class:`trainer.data.loading.batch.RankingBatch`.
    """

    integers: Tensor
    floats: Tensor
    rows: int
    ids_per_key: dict[str, int]
    skipped_rows: int = 0
    beyond: dict[str, int] = field(default_factory=dict)

    def pin_memory(self) -> PackedBatch:
        """Return the batch with its buffers in page-locked memory; ``DataLoader`` calls this method."""
        return replace(self, integers=self.integers.pin_memory(), floats=self.floats.pin_memory())

    def ids(self, layout: BatchLayout) -> list[PackedIds]:
        """Return the ids of each embedding dimension."""
        # The bounds follow from sizes that are known on the host, so nothing waits for the device.
        bounds = np.cumsum([0, *layout.integer_sizes(self.rows, self.ids_per_key)]).tolist()
        groups, at = [], 0
        for keys in layout.keys:
            offsets = [bound - bounds[at] for bound in bounds[at : at + len(keys) + 1]]
            values, lengths = bounds[at + len(keys)], bounds[at + len(keys) + 1]
            groups.append(PackedIds(keys, self.integers[bounds[at] : values], self.integers[values:lengths], offsets))
            at += len(keys) + 1
        return groups

    def columns(self, layout: BatchLayout) -> dict[str, Tensor]:
        """Return the columns ``user_id``, ``visit_id``, ``request_ms``, ``dense``, ``label`` and ``mask`` as views.

        Their shapes are those of :class:`trainer.data.loading.batch.RankingBatch`.
        """
        user_id, visit_id, request_ms = self.integers[len(self.integers) - 3 * self.rows :].view(3, self.rows)
        dense, label, mask = self.floats.split(layout.float_sizes(self.rows))
        return {
            "user_id": user_id,
            "visit_id": visit_id,
            "request_ms": request_ms,
            "dense": dense.view(self.rows, layout.n_dense),
            "label": label.view(self.rows, layout.behaviours),
            "mask": mask.view(self.rows, layout.behaviours),
        }
