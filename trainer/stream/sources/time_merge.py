"""Merge of partitions by event time, in the log order of each partition, into batches that carry their position."""

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
"""Additional int64 columns of events: the position of the partition after each event."""


@dataclass(frozen=True)
class _EventBlock:
    """Consecutive events of one partition or of the merged sequence, with their logged features."""

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
    """Queue of events: blocks are appended, and any number of events is taken from the front."""

    def __init__(self) -> None:
        self._blocks: deque[_EventBlock] = deque()
        self.rows = 0

    def append(self, block: _EventBlock) -> None:
        if len(block):
            self._blocks.append(block)
            self.rows += len(block)

    def take(self, rows: int) -> list[_EventBlock]:
        """Remove and return the first ``rows`` rows, in blocks."""
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
        """Return the number of rows in front with ``latest_ms`` before ``time_ms``, or up to it if ``inclusive``."""
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
    """Merges the events of several partitions into one sequence.

    The sort key of an event is the latest time in its partition up to it, so a partition keeps its order even if its
    times go back; ties are ordered by partition. An event is ready once no awaited partition can bring an earlier one.

    Args:
        position: start of each partition.
    """

    def __init__(self, position: Position) -> None:
        self._lanes = {partition: _Fifo() for partition in sorted(position)}
        self._latest = {partition: at[2] for partition, at in position.items()}
        self._awaited = set(position)
        self._position = {partition: list(at) for partition, at in position.items()}
        self._ready = _Fifo()

    @property
    def position(self) -> Position:
        """Position after the events taken."""
        return {partition: list(at) for partition, at in self._position.items()}

    @property
    def events(self) -> int:
        """Number of events in memory."""
        return self._ready.rows + sum(lane.rows for lane in self._lanes.values())

    def held(self, partition: int) -> int:
        """Return the number of events of a partition that wait for other partitions."""
        return self._lanes[partition].rows

    def append(self, partition: int, columns: Columns, logged: RequestFeatures) -> None:
        """Add the next events of a partition.

        Args:
            partition: a partition of the position.
            columns: ``EVENT_TYPES``, ``arrived_ms``, ``place``, ``inside`` and ``rejected``, each ``[n]``; the last two
                may be missing if they are always 0, and ``arrived_ms`` if it is known later.
            logged: logged features of some of the events.
        """
        time_ms = columns["time_ms"]
        if len(time_ms):
            # The key never goes back, so a partition keeps its log order in the merge.
            latest_ms = np.maximum.accumulate(np.maximum(time_ms, self._latest[partition]))
            self._latest[partition] = int(latest_ms[-1])
            owner = np.full(len(time_ms), partition, np.int32)
            self._lanes[partition].append(_EventBlock({**columns, "latest_ms": latest_ms, "partition": owner}, logged))

    def wait_for(self, partition: int, awaited: bool) -> None:
        """Set if the other partitions wait for this one when it has no events: not if it has ended or is silent."""
        (self._awaited.add if awaited else self._awaited.discard)(partition)

    def skip_to(self, partition: int, at: Sequence[int]) -> None:
        """Skip an empty partition's position past rejected messages."""
        assert not self.held(partition)
        self._position[partition] = list(at)

    def take(self, events: int, *, ticks_ms: Sequence[int] = (), rest: bool = False) -> EventBatch | None:
        """Return the next batch if it is complete: ``events`` events, or fewer up to a multiple of a tick.

        Args:
            events: size of a full batch.
            ticks_ms: a batch ends before the next multiple of each of these, in the merged event time. That time goes
                back if a partition that was not awaited brings earlier events.
            rest: return the ready events even if the batch is not complete.
        """
        self._advance()
        size = min(events, self._ready.rows)
        complete = size == events or rest
        if size and ticks_ms:
            # The tick of the first event bounds the batch.
            end_ms = min((self._ready.first_ms() // tick_ms + 1) * tick_ms for tick_ms in ticks_ms)
            inside = self._ready.before(end_ms, inclusive=False)
            complete, size = complete or inside < self._ready.rows, min(size, inside)
        return self._batch(_EventBlock.join(self._ready.take(size))) if complete and size else None

    def _advance(self) -> None:
        """Merge the events that no awaited partition can precede any more."""
        # Future events of a partition have at least its latest time as their sort key.
        bound = min(((self._latest[partition], partition) for partition in self._awaited), default=None)
        taken = []
        for partition, lane in self._lanes.items():
            # Ties are ordered by partition, so events at the bound are safe in partitions up to the bound's.
            safe = lane.rows if bound is None else lane.before(bound[0], inclusive=partition <= bound[1])
            taken += lane.take(safe)
        if taken:
            block = _EventBlock.join(taken)
            # Lanes are concatenated by partition and the sort is stable: ties stay in order of partition.
            self._ready.append(block.take(stable_order(block.columns["latest_ms"])))

    def _batch(self, block: _EventBlock) -> EventBatch:
        """Return a block as a batch, and advance the position."""
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
