"""Gathers the rows of a planned batch: blocks of records, decoded once, permuted, and cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows, row_columns
from trainer.data.format.shards import RowStore
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch_plan import BlockKey, BlockSlice


class Gathered(NamedTuple):
    """Rows of a batch, and how many more it would have had if no record were corrupt."""

    rows: Rows
    skipped: int


@dataclass(frozen=True)
class _DecodedBlock:
    """Decoded rows of a block; ``order[k]`` is the row that comes k-th, or -1 where its record is corrupt."""

    key: BlockKey
    rows: Rows
    order: np.ndarray


class BlockReader:
    """Reads pieces of blocks, keeping one block of each partition: a partition's blocks come one after the other.

    Args:
        store: of the dataset.
        spec: of the dataset.
        selection: the one that the batches were planned with.
        seed: of the permutations; None keeps the order of the records.
    """

    def __init__(self, store: RowStore, spec: DatasetSpec, selection: Selection, seed: int | None) -> None:
        self._store, self._columns, self._selection, self._seed = store, row_columns(spec), selection, seed
        self._blocks: dict[int, _DecodedBlock] = {}

    def gather(self, pieces: list[BlockSlice]) -> Gathered:
        """Rows of the pieces, in their order.

        Raises:
            UserError: a record is corrupt and the store does not skip such records.
        """
        found: list[tuple[Rows, np.ndarray]] = []
        skipped = 0
        for piece in pieces:
            block = self._block(piece)
            order = block.order[piece.start : piece.stop]
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
                    # Without a mode numpy buffers `out`, in case an index is wrong half-way.
                    np.take(columns[name], order, axis=0, out=out[start:stop], mode="clip")
                start = stop
        return Gathered(rows, skipped)

    def _block(self, piece: BlockSlice) -> _DecodedBlock:
        block = self._blocks.get(piece.key.partition)
        if block is None or block.key != piece.key:
            block = self._blocks[piece.key.partition] = self._read(piece)
        return block

    def _read(self, piece: BlockSlice) -> _DecodedBlock:
        parts, place, at = [], [], 0
        for record, planned in zip(piece.records.tolist(), piece.rows.tolist(), strict=True):
            rows = self._store.read(piece.key.partition, record)
            if rows is None:
                place.append(np.full(planned, -1))
                continue
            mask = self._selection.mask(rows)
            parts.append(rows if mask.all() else {name: column[mask] for name, column in rows.items()})
            place.append(np.arange(at, at + planned))
            at += planned
        order = np.concatenate(place)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, *piece.key]).permutation(order)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in self._columns} if parts else {}
        return _DecodedBlock(piece.key, columns, order)
