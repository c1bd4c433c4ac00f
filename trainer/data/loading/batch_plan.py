"""Plans the rows of each batch from the record index, without reading rows.

The records of a partition fall into *windows*: runs of records whose first emission lies in the same interval of
``shuffle_ms``. A rank goes through the windows of its partitions in time order. Inside a window, the rows of each
partition are permuted, and the partitions advance in parallel, each in proportion to its rows, so that a batch mixes
all users of the rank. The number of ranks affects only which partitions share a batch. So a position is a count of rows
per partition, and a run can resume from it with another number of ranks.

A window of more than :data:`SHUFFLE_POOL` rows is permuted in two steps: first its records, then the rows of *blocks*
of consecutive permuted records. So a reader holds one block of each partition, however long the windows are.
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
"""Number of rows that are shuffled together, over all partitions; about 100 MiB of decoded rows."""

_MIN_BLOCK_ROWS = 4096
_MERGE_ROWS = 1 << 20


class BlockKey(NamedTuple):
    """Key of a block; together with the seed of the run it determines the permutation of the block."""

    partition: int
    epoch: int
    window: int
    block: int


class BlockSlice(NamedTuple):
    """Consecutive rows of a block, in permuted order, that go into one batch.

    Attributes:
        key: key of the block.
        records: records of the block in the order in which they are read, ``[r]`` int64.
        rows: number of selected rows of each record, ``[r]`` int64.
        start: first row of the slice.
        stop: end of the slice.
    """

    key: BlockKey
    records: np.ndarray
    rows: np.ndarray
    start: int
    stop: int


class PlannedBatch(NamedTuple):
    """Slices of blocks that make up a batch, and the position of the rank after it."""

    slices: list[BlockSlice]
    position: ReadPosition


@dataclass(frozen=True)
class PartitionWindows:
    """Selected records of one partition, and the windows into which they fall.

    Attributes:
        records: records with selected rows, in emission order, ``[r]`` int64.
        rows: number of selected rows of each record, ``[r]`` int64.
        windows: window numbers in ascending order, ``[w]`` int64.
        starts: ``[w + 1]`` int64; window i has ``records[starts[i]:starts[i + 1]]``.
        window_rows: number of selected rows of each window, ``[w]`` int64.
    """

    records: np.ndarray
    rows: np.ndarray
    windows: np.ndarray
    starts: np.ndarray
    window_rows: np.ndarray


def partitions_of_rank(partitions: int, rank: int, world: int) -> list[int]:
    """Return the partitions that a rank owns: those with ``p % world == rank``.

    Raises:
        UserError: there are more ranks than partitions.
    """
    if world > partitions:
        raise UserError(
            f"{world} ranks, but the dataset has {partitions} partitions, and each partition belongs to one rank; "
            f"use at most {partitions} ranks, or build the dataset with more partitions"
        )
    return list(range(rank, partitions, world))


class ReadPlan:
    """Plan of the batches of one rank.

    Args:
        store: rows of the dataset; the plan reads only the index and the few records across an edge of the selection.
        partitions: partitions of the rank.
        selection: rows to read.
        batch_size: rows of a batch; the last one may have fewer.
        seed: seed of the permutations.
        epochs: number of passes over the selection; each pass has its own permutations.
        shuffle_ms: length of a window; None keeps the order of emission within each partition.
        state: position to resume from; None starts at the beginning. It may contain partitions of other ranks.

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
        """Number of rows of this rank over all epochs, counted from the beginning of the run."""
        return self._epochs * sum(int(part.window_rows.sum()) for part in self._partitions.values())

    @property
    def position(self) -> ReadPosition:
        """Position at which this plan starts."""
        return {partition: list(at) for partition, at in self._start.items()}

    @property
    def rows_done(self) -> int:
        """Number of rows of :attr:`rows_total` that lie before the start of this plan."""
        done = 0
        for partition, (epoch, window, offset) in self._start.items():
            part = self._partitions[partition]
            before = part.window_rows[: np.searchsorted(part.windows, window)]
            done += epoch * int(part.window_rows.sum()) + int(before.sum()) + offset
        return done

    def batches(self) -> Iterator[PlannedBatch]:
        """Yield the batches in order; each one is planned when it is requested."""
        position = self.position
        slices: list[BlockSlice] = []
        wanted = self._batch_size
        for epoch, window, owners, partitions in self._walk():
            blocks = _BlockCursor(self._blocks, epoch, window)
            for taken in _runs(len(owners), wanted, self._batch_size):
                counts = np.bincount(owners[taken], minlength=len(partitions))
                for i in np.flatnonzero(counts).tolist():
                    # An offset counts rows of its own window; in a new window it starts again at 0.
                    at = position[partitions[i]]
                    offset = at[2] if at[:2] == [epoch, window] else 0
                    stop = offset + int(counts[i])
                    slices += blocks.slices(partitions[i], offset, stop)
                    position[partitions[i]] = [epoch, window, stop]
                wanted -= taken.stop - taken.start
                if not wanted:
                    yield PlannedBatch(slices, {partition: list(at) for partition, at in position.items()})
                    slices, wanted = [], self._batch_size
        if slices:
            yield PlannedBatch(slices, position)

    def _walk(self) -> Iterator[tuple[int, int, np.ndarray, list[int]]]:
        """Yield the windows in time order, large ones in several steps.

        Yields:
            The epoch, the window, the owner of each of the next n rows as a position in the list of partitions (``[n]``
            int64), and the partitions that have rows in the window.
        """
        first_epoch = min((at[0] for at in self._start.values()), default=0)
        members: dict[int, list[int]] = {}
        for partition, part in self._partitions.items():
            for window in part.windows.tolist():
                members.setdefault(window, []).append(partition)
        # Partitions can stand in different epochs or windows after a change of ranks. The walk starts at the earliest,
        # and `done` skips what a partition has already consumed.
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
        """Return, for each block of a window, its records in reading order and their numbers of rows."""
        part = self._partitions[partition]
        i = int(np.searchsorted(part.windows, window))
        chosen = np.arange(part.starts[i], part.starts[i + 1])
        if self._shuffled:
            chosen = np.random.default_rng([self._seed, epoch, partition, window]).permutation(chosen)
        rows, total = part.rows[chosen], int(part.window_rows[i])
        # Records are dealt to blocks by the share of the rows before them, so that blocks have nearly equal sizes.
        number = (np.cumsum(rows) - rows) * -(-total // self._block_rows) // total
        cuts = np.flatnonzero(np.diff(number)) + 1
        return list(zip(np.split(part.records[chosen], cuts), np.split(rows, cuts), strict=True))

    def _window_rows(self, partition: int, window: int) -> int:
        """Return the number of selected rows of a window."""
        part = self._partitions[partition]
        return int(part.window_rows[np.searchsorted(part.windows, window)])

    def _checked(self, partition: int, state: Mapping[int, Sequence[int]]) -> list[int]:
        """Return the saved position of a partition, after a check that it lies in the selection."""
        if partition not in state:
            raise UserError(
                f"the saved read position has no partition {partition}, only {sorted(state)}; "
                f"resume with the dataset with which the run began"
            )
        epoch, window, offset = (int(part) for part in state[partition])
        known = self._partitions[partition].windows
        rows = self._window_rows(partition, window) if window in known else 0
        # A larger offset means that the window has changed since the position was saved.
        if offset > rows:
            raise UserError(
                f"the saved read position of partition {partition} is row {offset} of window {window}, which has "
                f"{rows} rows; resume with the data, range and shuffling with which the run began"
            )
        return [epoch, window, offset]


class _BlockCursor:
    """Cuts the rows of a window into slices at the edges of its blocks."""

    def __init__(
        self, blocks: Callable[[int, int, int], list[tuple[np.ndarray, np.ndarray]]], epoch: int, window: int
    ) -> None:
        self._blocks, self._epoch, self._window = blocks, epoch, window
        self._open: dict[int, tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]] = {}

    def slices(self, partition: int, start: int, stop: int) -> Iterator[BlockSlice]:
        """Yield rows ``[start, stop)`` of the partition's window as slices of blocks."""
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
    """Return the selected records of a partition; records across an edge of the selection are read to count rows."""
    index = store.records(partition)
    chosen = np.flatnonzero(selection.touches(index))
    rows = index.rows[chosen]
    for place in np.flatnonzero(~selection.covers(index)[chosen]).tolist():
        edge = store.read(partition, int(chosen[place]), selection.columns)
        # A corrupt record counts with all its rows: the reader will report them as skipped.
        rows[place] = rows[place] if edge is None else selection.mask(edge).sum()
    chosen, rows = chosen[rows > 0], rows[rows > 0]
    number = np.zeros(len(chosen), np.int64) if shuffle_ms is None else index.emit_min[chosen] // shuffle_ms
    windows, starts = np.unique(number, return_index=True)
    starts = np.append(starts, len(chosen))
    window_rows = np.add.reduceat(rows, starts[:-1]) if len(chosen) else np.zeros(0, np.int64)
    return PartitionWindows(chosen, rows, windows, starts, window_rows)


def _consumed(position: Sequence[int], epoch: int, window: int, rows: int) -> int:
    """Return how many of the ``rows`` rows of a window lie before a position."""
    at, here = (position[0], position[1]), (epoch, window)
    return rows if here < at else position[2] if here == at else 0


def _interleaved(rows: np.ndarray, done: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the order in which partitions advance through a window: each in proportion to its rows.

    Row k of n rows comes at ``(k + 1/2) / n``; ties are in order of the partitions. This is a fixed order of all rows
    of the window, and the consumed rows are a prefix of it, so a resumed run continues the same order. It is yielded in
    parts, which bounds the memory.

    Args:
        rows: number of rows of each partition, ``[p]``.
        done: number of rows already consumed of each, ``[p]``.

    Yields:
        Partitions of the next rows as positions in ``rows``, ``[n]`` int64.
    """
    slices = -(-int(rows.sum()) // _MERGE_ROWS)
    for i in range(slices):
        low, high = np.maximum(rows * i // slices, done), rows * (i + 1) // slices
        left = np.maximum(high - low, 0)
        owner = np.repeat(np.arange(len(rows)), left)
        step = np.arange(left.sum()) - np.repeat(np.cumsum(left) - left, left)
        # Each slice takes the same share of every partition, so the partitions stay in step over the whole window.
        progress = (low[owner] + step + 0.5) / rows[owner]
        yield owner[np.argsort(progress, kind="stable")]


def _runs(rows: int, first: int, size: int) -> Iterator[slice]:
    """Yield ``[0, rows)`` cut after ``first`` rows and then after every ``size`` rows."""
    start, stop = 0, min(first, rows)
    while start < rows:
        yield slice(start, stop)
        start, stop = stop, min(stop + size, rows)
