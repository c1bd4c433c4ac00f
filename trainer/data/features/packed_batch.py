"""Batches as two flat buffers, in which they travel between processes, and the layout of these buffers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.data.features.code_inputs import CodeCounts


@dataclass(frozen=True)
class BatchLayout:
    """Layout of the batches, which sender and receiver both know.

    Attributes:
        keys: for each embedding dimension, the names of its lookups.
        n_dense: number of columns of ``dense``.
        behaviours: number of columns of ``label`` and ``mask``.
        pairs: True if rows are pairs of a user and an author, with the columns ``author_id`` and ``log_q``.
    """

    keys: tuple[tuple[str, ...], ...]
    n_dense: int
    behaviours: int
    pairs: bool = False

    def integer_sizes(self, rows: int, ids_per_key: dict[str, int]) -> list[int]:
        """Return the lengths of the parts of :attr:`PackedBatch.integers`, in order."""
        sizes: list[int] = []
        for keys in self.keys:
            sizes += [ids_per_key[key] for key in keys]
            sizes.append(len(keys) * rows)
        return [*sizes, rows, rows, rows, *([rows] if self.pairs else [])]

    def float_sizes(self, rows: int) -> list[int]:
        """Return the lengths of the parts of :attr:`PackedBatch.floats`, in order."""
        sizes = [rows * self.n_dense, rows * self.behaviours, rows * self.behaviours]
        return [*sizes, rows] if self.pairs else sizes


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
            ``user_id``, ``visit_id``, ``request_ms`` and, in a layout of pairs, ``author_id``.
        floats: float32. ``dense``, ``label`` and ``mask``, each row by row; in a layout of pairs also ``log_q``.
        rows: number of rows.
        ids_per_key: lookup name -> number of ids.
        skipped_rows: see :class:`trainer.data.loading.batch.RankingBatch`.
        beyond: see :class:`trainer.data.loading.batch.RankingBatch`.
        left_out_rows: see :class:`trainer.data.loading.batch.RankingBatch`.
        no_code: see :class:`trainer.data.loading.batch.RankingBatch`.
    """

    integers: Tensor
    floats: Tensor
    rows: int
    ids_per_key: dict[str, int]
    skipped_rows: int = 0
    beyond: dict[str, int] = field(default_factory=dict)
    left_out_rows: int = 0
    no_code: dict[str, CodeCounts] = field(default_factory=dict)

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

        A layout of pairs has ``author_id`` and ``log_q`` as well.

        Their shapes are those of :class:`trainer.data.loading.batch.RankingBatch`.
        """
        columns = 4 if layout.pairs else 3
        integers = self.integers[len(self.integers) - columns * self.rows :].view(columns, self.rows)
        user_id, visit_id, request_ms = integers[:3]
        dense, label, mask, *log_q = self.floats.split(layout.float_sizes(self.rows))
        return {
            **({"author_id": integers[3], "log_q": log_q[0]} if layout.pairs else {}),
            "user_id": user_id,
            "visit_id": visit_id,
            "request_ms": request_ms,
            "dense": dense.view(self.rows, layout.n_dense),
            "label": label.view(self.rows, layout.behaviours),
            "mask": mask.view(self.rows, layout.behaviours),
        }
