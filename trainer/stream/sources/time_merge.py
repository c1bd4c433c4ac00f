"""Merges partitions by event time, each in the order of its log, and cuts batches whose position is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.format.sorting import stable_order
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import EVENT_TYPES, concatenate
from trainer.stream.sources.logged_features import RequestFeatures
from trainer.stream.sources.source import EventBatch, Position

PLACES = ("place", "inside", "latest_ms", "rejected")
"""Columns beside the event's own, int64: the position of the partition after the event."""


@dataclass(frozen=True)
class _EventBlock:
    """Events behind one another, and the features of those that carry them."""

    columns: Columns
    logged: RequestFeatures

    def __len__(self) -> int:
        return len(self.columns["latest_ms"])

    def part(self, first: int, stop: int) -> _EventBlock:
        columns = {name: column[first:stop] for name, column in self.columns.items()}
        return _EventBlock(columns, self.logged.part(first, stop))

    def take(self, order: np.ndarray) -> _EventBlock:
        return _EventBlock({name: column[order] for name, column in self.columns.items()}, self.logged.take(order))

    @staticmethod
    def join(blocks: Sequence[_EventBlock]) -> _EventBlock:
        logged = RequestFeatures.join([block.logged for block in blocks], [len(block) for block in blocks])
        return _EventBlock(concatenate([block.columns for block in blocks]), logged)


class _Fifo:
    """Blocks that are appended, and events that are taken from the front."""

    def __init__(self) -> None:
        self._blocks: deque[_EventBlock] = deque()
        self.rows = 0

    def append(self, block: _EventBlock) -> None:
        if len(block):
            self._blocks.append(block)
            self.rows += len(block)

    def take(self, rows: int) -> list[_EventBlock]:
        """The first ``rows`` rows, in blocks."""
        taken = []
        self.rows -= rows
        while rows:
            block = self._blocks.popleft()
            if len(block) > rows:
                self._blocks.appendleft(block.part(rows, len(block)))
                block = block.part(0, rows)
            taken.append(block)
            rows -= len(block)
        return taken

    def before(self, time_ms: int, inclusive: bool) -> int:
        """Rows at the front whose ``latest_ms`` is less than ``time_ms``, or equal to it if ``inclusive``."""
        rows = 0
        for block in self._blocks:
            inside = int(np.searchsorted(block.columns["latest_ms"], time_ms, "right" if inclusive else "left"))
            rows += inside
            if inside < len(block):
                break
        return rows

    def first_ms(self) -> int:
        return int(self._blocks[0].columns["latest_ms"][0])


class TimeMerge:
    """Events of several partitions as one sequence.

    An event's place in it is the latest time in its partition up to it, so a partition keeps its order however its
    times run; ties go by partition. An event is handed out once no partition that is waited for can still bring an
    earlier one.

    Args:
        position: where each partition starts.
    """

    def __init__(self, position: Position) -> None:
        self._lanes = {partition: _Fifo() for partition in sorted(position)}
        self._latest = {partition: at[2] for partition, at in position.items()}
        self._awaited = set(position)
        self._position = {partition: list(at) for partition, at in position.items()}
        self._ready = _Fifo()

    @property
    def position(self) -> Position:
        """After what was taken."""
        return {partition: list(at) for partition, at in self._position.items()}

    @property
    def events(self) -> int:
        """Events held."""
        return self._ready.rows + sum(lane.rows for lane in self._lanes.values())

    def held(self, partition: int) -> int:
        """Events of a partition that wait for others."""
        return self._lanes[partition].rows

    def append(self, partition: int, columns: Columns, logged: RequestFeatures) -> None:
        """Add the next events of a partition.

        Args:
            partition: one of those of the position.
            columns: of ``EVENT_TYPES``, ``arrived_ms``, ``place``, ``inside`` and ``rejected``, each ``[n]``; the last
                two may be left out where they are always 0, and ``arrived_ms`` where it is known later.
            logged: features of those that carry them.
        """
        time_ms = columns["time_ms"]
        if len(time_ms):
            latest_ms = np.maximum.accumulate(np.maximum(time_ms, self._latest[partition]))
            self._latest[partition] = int(latest_ms[-1])
            owner = np.full(len(time_ms), partition, np.int32)
            self._lanes[partition].append(_EventBlock({**columns, "latest_ms": latest_ms, "partition": owner}, logged))

    def wait_for(self, partition: int, awaited: bool) -> None:
        """Whether the others wait for a partition that has no events here: not if it has ended or is silent."""
        (self._awaited.add if awaited else self._awaited.discard)(partition)

    def skip_to(self, partition: int, at: Sequence[int]) -> None:
        """The position of a partition of which nothing is held is further on: what is there was rejected."""
        assert not self.held(partition)
        self._position[partition] = list(at)

    def take(self, events: int, *, ticks_ms: Sequence[int] = (), rest: bool = False) -> EventBatch | None:
        """The next batch if it is complete: ``events`` events, or fewer up to a multiple of a tick.

        Args:
            events: of a batch.
            ticks_ms: a batch ends before the next multiple of each, in milliseconds of the time by which the partitions
                are merged. Where a partition that was not waited for brings earlier events, that time goes back.
            rest: hand out what is there, complete or not.
        """
        self._advance()
        size = min(events, self._ready.rows)
        complete = size == events or rest
        if size and ticks_ms:
            end_ms = min((self._ready.first_ms() // tick_ms + 1) * tick_ms for tick_ms in ticks_ms)
            inside = self._ready.before(end_ms, inclusive=False)
            complete, size = complete or inside < self._ready.rows, min(size, inside)
        return self._batch(_EventBlock.join(self._ready.take(size))) if complete and size else None

    def _advance(self) -> None:
        """Merge the events that nothing can come before any more."""
        # What a partition still brings has at least its latest time.
        bound = min(((self._latest[partition], partition) for partition in self._awaited), default=None)
        taken = []
        for partition, lane in self._lanes.items():
            safe = lane.rows if bound is None else lane.before(bound[0], inclusive=partition <= bound[1])
            taken += lane.take(safe)
        if taken:
            block = _EventBlock.join(taken)
            self._ready.append(block.take(stable_order(block.columns["latest_ms"])))

    def _batch(self, block: _EventBlock) -> EventBatch:
        columns, rows = block.columns, len(block)
        owner = columns["partition"]
        for partition in np.unique(owner).tolist():
            last = rows - 1 - int(np.argmax(owner[::-1] == partition))
            self._position[partition] = [int(columns[name][last]) if name in columns else 0 for name in PLACES]
        return EventBatch(
            events={name: columns[name] for name in EVENT_TYPES},
            logged=block.logged,
            partition=owner,
            arrived_ms=columns.get("arrived_ms", columns["latest_ms"]),
            position=self.position,
        )
