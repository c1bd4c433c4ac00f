"""Which rows make up which batch: arithmetic on the record index, without reading rows.

A partition's records fall into *windows*: runs of records whose first emission lies in the same stretch of
``shuffle_ms``. A rank walks the windows of its partitions in time order. Inside a window the rows of a partition are
permuted, and the partitions advance side by side, each by its fraction, so that a batch mixes all users of the rank.
Nothing of this depends on the ranks but which partitions meet in a batch; so a position is a count of rows per
partition, and another number of ranks can go on from it.

A window of more than :data:`SHUFFLE_POOL` rows is permuted in two steps, its records and then the rows of *blocks* of
consecutive permuted records, so that a reader holds one block of each partition however long the windows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.shards import RowStore
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import ReadPosition

SHUFFLE_POOL = 1 << 18
"""Rows among which a row is mixed at random, over all partitions; about 100 MiB of decoded rows."""

_MIN_BLOCK_ROWS = 4096
_MERGE_ROWS = 1 << 20


class BlockKey(NamedTuple):
    """Names a block, and with the seed of the run also its permutation."""

    partition: int
    epoch: int
    window: int
    block: int


class BlockSlice(NamedTuple):
    """A run of a block's rows that goes into one batch.

    Attributes:
        key: of the block.
        records: ``[r]`` int64, the block's records in the order in which they are read.
        rows: ``[r]`` int64, selected rows of each.
        start: first row of the run, counted in permuted order.
        stop: end of the run.
    """

    key: BlockKey
    records: np.ndarray
    rows: np.ndarray
    start: int
    stop: int


class PlannedBatch(NamedTuple):
    """The pieces of a batch, and where the rank stands after it."""

    pieces: list[BlockSlice]
    position: ReadPosition


@dataclass(frozen=True)
class PartitionWindows:
    """The selected records of one partition.

    Attributes:
        records: ``[r]`` int64, records with selected rows, in emission order.
        rows: ``[r]`` int64, selected rows of each.
        windows: ``[w]`` int64, ascending window numbers.
        starts: ``[w + 1]`` int64; window i has ``records[starts[i]:starts[i + 1]]``.
        window_rows: ``[w]`` int64, selected rows of each window.
    """

    records: np.ndarray
    rows: np.ndarray
    windows: np.ndarray
    starts: np.ndarray
    window_rows: np.ndarray


def partitions_of_rank(partitions: int, rank: int, world: int) -> list[int]:
    """The partitions that a rank owns: ``p % world == rank``.

    Raises:
        UserError: more ranks than partitions.
    """
    if world > partitions:
        raise UserError(
            f"{world} ranks but the dataset has {partitions} partitions, and a partition belongs to one rank; "
            f"use at most {partitions} ranks or make the dataset with more partitions"
        )
    return list(range(rank, partitions, world))


class ReadPlan:
    """The batches of one rank.

    Args:
        store: the rows; read for their index, and for the few records that lie across an edge of the selection.
        partitions: of the rank.
        selection: rows to read.
        batch_size: rows of a batch; the last one may have fewer.
        seed: of the permutations.
        epochs: passes over the selection; the permutations of each differ.
        shuffle_ms: length of a window; None keeps the order of emission within each partition.
        state: positions to go on from; None starts at the beginning. Partitions of other ranks may be in it.

    Raises:
        UserError: a partition of the rank is missing in ``state``, or its position is outside the selection.
    """

    def __init__(
        self,
        store: RowStore,
        partitions: Sequence[int],
        selection: Selection,
        *,
        batch_size: int,
        seed: int,
        epochs: int = 1,
        shuffle_ms: int | None = None,
        state: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._batch_size, self._seed, self._epochs, self._shuffled = batch_size, seed, epochs, shuffle_ms is not None
        self._block_rows = max(SHUFFLE_POOL // store.partitions, _MIN_BLOCK_ROWS)
        self._partitions: dict[int, PartitionWindows] = {
            partition: _windows(store, partition, selection, shuffle_ms) for partition in partitions
        }
        self._start: ReadPosition = {partition: [0, 0, 0] for partition in partitions}
        if state is not None:
            self._start = {partition: self._checked(partition, state) for partition in partitions}

    @property
    def rows_total(self) -> int:
        """Rows of this rank over all epochs, from the very beginning."""
        return self._epochs * sum(int(part.window_rows.sum()) for part in self._partitions.values())

    @property
    def position(self) -> ReadPosition:
        """Where this plan starts."""
        return {partition: list(at) for partition, at in self._start.items()}

    @property
    def rows_done(self) -> int:
        """Rows of :attr:`rows_total` that lie before the position that this plan started from."""
        done = 0
        for partition, (epoch, window, offset) in self._start.items():
            part = self._partitions[partition]
            before = part.window_rows[: np.searchsorted(part.windows, window)]
            done += epoch * int(part.window_rows.sum()) + int(before.sum()) + offset
        return done

    def batches(self) -> Iterator[PlannedBatch]:
        """The batches in order, planned as they are asked for."""
        position = self.position
        pieces: list[BlockSlice] = []
        wanted = self._batch_size
        for epoch, window, owners, partitions in self._walk():
            blocks = _BlockCursor(self._blocks, epoch, window)
            for taken in _runs(len(owners), wanted, self._batch_size):
                counts = np.bincount(owners[taken], minlength=len(partitions))
                for i in np.flatnonzero(counts).tolist():
                    at = position[partitions[i]]
                    offset = at[2] if at[:2] == [epoch, window] else 0
                    stop = offset + int(counts[i])
                    pieces += blocks.pieces(partitions[i], offset, stop)
                    position[partitions[i]] = [epoch, window, stop]
                wanted -= taken.stop - taken.start
                if not wanted:
                    yield PlannedBatch(pieces, {partition: list(at) for partition, at in position.items()})
                    pieces, wanted = [], self._batch_size
        if pieces:
            yield PlannedBatch(pieces, position)

    def _walk(self) -> Iterator[tuple[int, int, np.ndarray, list[int]]]:
        """Windows in time order, in slices: epoch, window, whose rows come next (``[n]`` places), the partitions."""
        first_epoch = min((at[0] for at in self._start.values()), default=0)
        members: dict[int, list[int]] = {}
        for partition, part in self._partitions.items():
            for window in part.windows.tolist():
                members.setdefault(window, []).append(partition)
        for epoch in range(first_epoch, self._epochs):
            for window in sorted(members):
                partitions = members[window]
                rows = [self._window_rows(partition, window) for partition in partitions]
                done = [
                    _consumed(self._start[partition], epoch, window, n)
                    for partition, n in zip(partitions, rows, strict=True)
                ]
                for owners in _interleaved(np.array(rows), np.array(done)):
                    yield epoch, window, owners, partitions

    def _blocks(self, partition: int, epoch: int, window: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Records of each block of a window, in the order in which they are read, and their numbers of rows."""
        part = self._partitions[partition]
        i = int(np.searchsorted(part.windows, window))
        chosen = np.arange(part.starts[i], part.starts[i + 1])
        if self._shuffled:
            chosen = np.random.default_rng([self._seed, epoch, partition, window]).permutation(chosen)
        rows, total = part.rows[chosen], int(part.window_rows[i])
        number = (np.cumsum(rows) - rows) * -(-total // self._block_rows) // total
        cuts = np.flatnonzero(np.diff(number)) + 1
        return list(zip(np.split(part.records[chosen], cuts), np.split(rows, cuts), strict=True))

    def _window_rows(self, partition: int, window: int) -> int:
        part = self._partitions[partition]
        return int(part.window_rows[np.searchsorted(part.windows, window)])

    def _checked(self, partition: int, state: Mapping[int, Sequence[int]]) -> list[int]:
        if partition not in state:
            raise UserError(
                f"the saved read position has no partition {partition}; it has {sorted(state)}: "
                f"resume with the dataset that the run began with"
            )
        epoch, window, offset = (int(part) for part in state[partition])
        known = self._partitions[partition].windows
        rows = self._window_rows(partition, window) if window in known else 0
        if offset > rows:
            raise UserError(
                f"the saved read position of partition {partition} is row {offset} of window {window}, which has "
                f"{rows} rows: data, range and shuffling must be those that the run began with"
            )
        return [epoch, window, offset]


class _BlockCursor:
    """Cuts runs of a window's rows at the edges of its blocks."""

    def __init__(
        self, blocks: Callable[[int, int, int], list[tuple[np.ndarray, np.ndarray]]], epoch: int, window: int
    ) -> None:
        self._blocks, self._epoch, self._window = blocks, epoch, window
        self._open: dict[int, tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]] = {}

    def pieces(self, partition: int, start: int, stop: int) -> Iterator[BlockSlice]:
        """Rows ``[start, stop)`` of the partition's window as pieces of blocks."""
        if partition not in self._open:
            blocks = self._blocks(partition, self._epoch, self._window)
            self._open[partition] = blocks, np.cumsum([0, *(rows.sum() for _, rows in blocks)])
        blocks, edges = self._open[partition]
        block = int(np.searchsorted(edges, start, side="right")) - 1
        while start < stop:
            begin, end = int(edges[block]), int(edges[block + 1])
            records, rows = blocks[block]
            key = BlockKey(partition, self._epoch, self._window, block)
            yield BlockSlice(key, records, rows, start - begin, min(stop, end) - begin)
            start, block = end, block + 1


def _windows(store: RowStore, partition: int, selection: Selection, shuffle_ms: int | None) -> PartitionWindows:
    """Selected records of a partition; the few across an edge of the selection are read to count their rows."""
    index = store.records(partition)
    chosen = np.flatnonzero(selection.touches(index))
    rows = index.rows[chosen]
    for place in np.flatnonzero(~selection.covers(index)[chosen]).tolist():
        edge = store.read(partition, int(chosen[place]), ["emit_ms", "request_ms"])
        # All rows of a corrupt record count: the reader will report them as skipped.
        rows[place] = rows[place] if edge is None else selection.mask(edge).sum()
    chosen, rows = chosen[rows > 0], rows[rows > 0]
    number = np.zeros(len(chosen), np.int64) if shuffle_ms is None else index.emit_min[chosen] // shuffle_ms
    windows, starts = np.unique(number, return_index=True)
    starts = np.append(starts, len(chosen))
    window_rows = np.add.reduceat(rows, starts[:-1]) if len(chosen) else np.zeros(0, np.int64)
    return PartitionWindows(chosen, rows, windows, starts, window_rows)


def _consumed(position: Sequence[int], epoch: int, window: int, rows: int) -> int:
    """Rows of a window of ``rows`` rows that lie before a position."""
    at, here = (position[0], position[1]), (epoch, window)
    return rows if here < at else position[2] if here == at else 0


def _interleaved(rows: np.ndarray, done: np.ndarray) -> Iterator[np.ndarray]:
    """Order in which partitions advance through a window: each in proportion to its rows.

    Row k of n rows comes at ``(k + 1/2) / n``, ties by partition. It is a fixed order of all rows of the window, of
    which those done are a prefix; so going on from a position continues the same order. Slices bound the memory.

    Args:
        rows: ``[p]`` rows of each partition.
        done: ``[p]`` rows already consumed.

    Yields:
        ``[n]`` int64, partition (by place) of the next rows.
    """
    slices = -(-int(rows.sum()) // _MERGE_ROWS)
    for i in range(slices):
        low, high = np.maximum(rows * i // slices, done), rows * (i + 1) // slices
        left = np.maximum(high - low, 0)
        owner = np.repeat(np.arange(len(rows)), left)
        step = np.arange(left.sum()) - np.repeat(np.cumsum(left) - left, left)
        progress = (low[owner] + step + 0.5) / rows[owner]
        yield owner[np.argsort(progress, kind="stable")]


def _runs(rows: int, first: int, size: int) -> Iterator[slice]:
    """``[0, rows)`` cut after ``first`` rows and then every ``size`` rows."""
    start, stop = 0, min(first, rows)
    while start < rows:
        yield slice(start, stop)
        start, stop = stop, min(stop + size, rows)
