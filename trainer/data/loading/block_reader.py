"""Gathers the rows of planned batches: decodes each block of records once, permutes its rows and cuts slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows, row_columns
from trainer.data.format.shards import RowStore
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch_plan import BlockKey, BlockSlice


class Gathered(NamedTuple):
    """Rows of a batch.

    Attributes:
        rows: the rows.
        skipped: number of rows that are missing because their records are corrupt.
    """

    rows: Rows
    skipped: int


@dataclass(frozen=True)
class _DecodedBlock:
    """Decoded rows of a block; ``order[k]`` is the k-th row in permuted order, or -1 if its record is corrupt."""

    key: BlockKey
    rows: Rows
    order: np.ndarray


class BlockReader:
    """Reads slices of blocks. It keeps one block of each partition, as a partition's blocks follow one another.

    Args:
        store: rows of the dataset.
        spec: description of the dataset.
        selection: the selection with which the batches were planned.
        seed: seed of the permutations; None keeps the order of the records.
    """

    def __init__(self, store: RowStore, spec: DatasetSpec, selection: Selection, seed: int | None) -> None:
        self._store, self._columns, self._selection, self._seed = store, row_columns(spec), selection, seed
        self._blocks: dict[int, _DecodedBlock] = {}

    def gather(self, slices: list[BlockSlice]) -> Gathered:
        """Return the rows of the slices, in their order.

        Raises:
            UserError: a record is corrupt and the store does not skip such records.
        """
        found: list[tuple[Rows, np.ndarray]] = []
        skipped = 0
        for part in slices:
            block = self._block(part)
            order = block.order[part.start : part.stop]
            present = order[order >= 0]
            skipped += len(order) - len(present)
            found.append((block.rows, present))
        total = sum(len(order) for _, order in found)
        rows = {name: np.empty((total, *shape), dtype) for name, (dtype, shape) in self._columns.items()}
        start = 0
        for columns, order in found:
            if len(order):
                stop = start + len(order)
                for name, out in rows.items():
                    # Without a mode, numpy buffers `out` in case an index is out of range.
                    np.take(columns[name], order, axis=0, out=out[start:stop], mode="clip")
                start = stop
        return Gathered(rows, skipped)

    def _block(self, part: BlockSlice) -> _DecodedBlock:
        """Return the block of a slice; it is read if it is not the last one of its partition."""
        block = self._blocks.get(part.key.partition)
        if block is None or block.key != part.key:
            block = self._blocks[part.key.partition] = self._read(part)
        return block

    def _read(self, part: BlockSlice) -> _DecodedBlock:
        """Read and permute the block of a slice."""
        parts, place, at = [], [], 0
        for record, planned in zip(part.records.tolist(), part.rows.tolist(), strict=True):
            rows = self._store.read(part.key.partition, record)
            if rows is None:
                # The plan has counted these rows: they keep their places, so that all positions stay valid.
                place.append(np.full(planned, -1))
                continue
            mask = self._selection.mask(rows)
            parts.append(rows if mask.all() else {name: column[mask] for name, column in rows.items()})
            place.append(np.arange(at, at + planned))
            at += planned
        order = np.concatenate(place)
        if self._seed is not None:
            # Seeded by the key: the same permutation in any process and after a resume.
            order = np.random.default_rng([self._seed, *part.key]).permutation(order)
        columns = {name: np.concatenate([rows[name] for rows in parts]) for name in self._columns} if parts else {}
        return _DecodedBlock(part.key, columns, order)
