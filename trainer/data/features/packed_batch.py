"""Batches as two flat buffers, in which they travel between processes, and the layout of these buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modules.content import BatchVectors
from trainer.data.features.missing_inputs import MissingCounts

VECTOR_ALIGNMENT = 16
"""Multiple of bytes at which the vectors of each table begin in a packed batch."""


@dataclass(frozen=True)
class ContentLayout:
    """Pre-trained vectors of one table in a batch.

    Attributes:
        name: name of the table in ``features.content``, and of the lookup of the candidate.
        width: number of elements of a vector.
        dim: width of the learnt projection of a vector.
        dtype: type of the vectors, ``float16`` or ``float32``.
        entries: lookup of each history whose entries have vectors -> lookup of a table with one id for each entry.
    """

    name: str
    width: int
    dim: int
    dtype: str
    entries: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchLayout:
    """Layout of the batches, which sender and receiver both know.

    Attributes:
        keys: for each embedding dimension, the names of its lookups.
        n_dense: number of columns of ``dense``.
        behaviours: number of columns of ``label`` and ``mask``.
        pairs: True if rows are pairs of a user and an author, with the columns ``author_id`` and ``log_q``.
        content: tables of pre-trained vectors.
    """

    keys: tuple[tuple[str, ...], ...]
    n_dense: int
    behaviours: int
    pairs: bool = False
    content: tuple[ContentLayout, ...] = ()

    def integer_sizes(self, rows: int, ids_per_key: dict[str, int], left: int = 0) -> list[int]:
        """Return the lengths of the parts of :attr:`PackedBatch.integers`, in order.

        Args:
            rows: number of rows.
            ids_per_key: lookup name -> number of ids.
            left: number of histories that are left to the device.
        """
        sizes: list[int] = []
        for keys in self.keys:
            sizes += [ids_per_key[key] for key in keys]
            sizes.append(len(keys) * rows)
        for table in self.content:
            sizes += [rows, *(ids_per_key[key] for key in table.entries.values())]
        columns = self.left_columns(left) + 3 + self.pairs
        return [*sizes, *([rows] * columns)]

    def left_columns(self, left: int) -> int:
        """Return the number of :attr:`LeftSearches.columns` of some histories."""
        return 1 + 2 * left + sum(bool(table.entries) for table in self.content) if left else 0

    def float_sizes(self, rows: int) -> list[int]:
        """Return the lengths of the parts of :attr:`PackedBatch.floats`, in order."""
        sizes = [rows * self.n_dense, rows * self.behaviours, rows * self.behaviours]
        return [*sizes, rows] if self.pairs else sizes

    def vector_sizes(self, counts: Sequence[int]) -> list[int]:
        """Return the bytes of the parts of :attr:`PackedBatch.vectors`, for the number of vectors of each table."""
        sizes = [
            count * table.width * np.dtype(table.dtype).itemsize
            for count, table in zip(counts, self.content, strict=True)
        ]
        return [-(-size // VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT for size in sizes]


class LeftSearches(NamedTuple):
    """Searches of a batch that are left to its device: until they are made, the ids of these histories are zeros.

    Attributes:
        columns: ``[1 + 2 * histories + tables, rows]`` int64: the time as of which histories are read, in milliseconds;
            then for each history the first place of each row's run on the device, and the place after the last one;
            then for each table of pre-trained vectors that histories have the key of each candidate's vector.
        longest: name of the history -> number of entries of its longest run, in the order of the columns.
        version: version of the search vectors.
    """

    columns: Tensor
    longest: dict[str, int]
    version: int = 0

    @property
    def as_of_ms(self) -> Tensor:
        """Time of each row, ``[rows]``."""
        return self.columns[0]

    def run(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the runs of a history, each ``[rows]``."""
        place = 1 + 2 * list(self.longest).index(name)
        return self.columns[place], self.columns[place + 1]

    def keys(self, place: int) -> Tensor:
        """Return the keys of the candidates' vectors, ``[rows]``, of a table by its number among those of histories."""
        return self.columns[1 + 2 * len(self.longest) + place]


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
    """A batch as a few flat tensors, so that a worker process hands over as few handles, whatever the features are.

    Attributes:
        integers: int64. For each embedding dimension, the ids key by key and then the lengths key by key; then, for
            each table of pre-trained vectors, the places of its vectors, lookup by lookup; then the columns of
            searches that are left to the device; at the end ``user_id``, ``visit_id``, ``request_ms`` and, in a layout
            of pairs, ``author_id``.
        floats: float32. ``dense``, ``label`` and ``mask``, each row by row; in a layout of pairs also ``log_q``.
        rows: number of rows.
        ids_per_key: lookup name -> number of ids.
        skipped_rows: see :class:`trainer.data.loading.batch.RankingBatch`.
        beyond: see :class:`trainer.data.loading.batch.RankingBatch`.
        left_out_rows: see :class:`trainer.data.loading.batch.RankingBatch`.
        missing: see :class:`trainer.data.loading.batch.RankingBatch`.
        vectors: uint8, the distinct pre-trained vectors, table by table; None for a model without such tables.
        vector_counts: number of vectors of each table.
        longest: history whose search is left to the device -> number of entries of its longest run.
        version: version of the search vectors for these searches.
    """

    integers: Tensor
    floats: Tensor
    rows: int
    ids_per_key: dict[str, int]
    skipped_rows: int = 0
    beyond: dict[str, int] = field(default_factory=dict)
    left_out_rows: int = 0
    missing: dict[str, MissingCounts] = field(default_factory=dict)
    vectors: Tensor | None = None
    vector_counts: tuple[int, ...] = ()
    longest: dict[str, int] = field(default_factory=dict)
    version: int = 0

    @property
    def buffers(self) -> list[Tensor]:
        """Tensors of the batch."""
        return [self.integers, self.floats, *([] if self.vectors is None else [self.vectors])]

    def pin_memory(self) -> PackedBatch:
        """Return the batch with its buffers in page-locked memory; ``DataLoader`` calls this method."""
        pinned = [buffer.pin_memory() for buffer in self.buffers]
        return replace(self, integers=pinned[0], floats=pinned[1], vectors=pinned[2] if len(pinned) > 2 else None)

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

    def content(self, layout: BatchLayout) -> dict[str, BatchVectors]:
        """Return the pre-trained vectors of each table."""
        if not layout.content:
            return {}
        bounds = np.cumsum([0, *layout.integer_sizes(self.rows, self.ids_per_key)]).tolist()
        at = sum(len(keys) + 1 for keys in layout.keys)
        counts = self.vector_counts or (0,) * len(layout.content)
        buffer = torch.empty(0, dtype=torch.uint8) if self.vectors is None else self.vectors
        found = {}
        for table, count, part in zip(layout.content, counts, buffer.split(layout.vector_sizes(counts)), strict=True):
            names = (table.name, *table.entries)
            places = {
                name: self.integers[bounds[place] : bounds[place + 1]] for place, name in enumerate(names, start=at)
            }
            at += len(names)
            elements = part.view(getattr(torch, table.dtype))[: count * table.width]
            found[table.name] = BatchVectors(elements.view(count, table.width), places, table.entries)
        return found

    def left(self, layout: BatchLayout) -> LeftSearches | None:
        """Return the searches that are left to the device; None if there are none."""
        if not self.longest:
            return None
        columns = layout.left_columns(len(self.longest))
        end = len(self.integers) - (3 + layout.pairs) * self.rows
        view = self.integers[end - columns * self.rows : end].view(columns, self.rows)
        return LeftSearches(view, self.longest, self.version)

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
