"""What a source of events is, and how a rank reads one: in a defined order, ahead of training, from any position.

A source has partitions; a user's events are in one of them, and a rank owns partitions ``p % world == rank``. Opened at
a position it gives exactly what follows. Every batch carries the position after it, so whoever saves the position of
the last batch that was applied, together with what that changed, applies every event exactly once: nothing of it is
kept anywhere else, and what had been read ahead is read again.

**Position.** Partition -> ``[place, inside, latest_ms, rejected]``: the next row (files) or offset (Kafka), how many
events of the message there are done, the latest time among the events so far, and how many events were rejected. The
union over the ranks is the position of the job; any number of ranks can go on from it.

**Order.** Events of a partition stay in the order of the log. The partitions of a rank are merged by event time: what
comes next depends on the position and on what the log holds, not on when it arrived or in what portions it was read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.validation import Columns
from trainer.stream.sources.logged_features import RequestFeatures

Position = dict[int, list[int]]
"""Partition -> ``[place, inside, latest_ms, rejected]``, see above; JSON-able."""

SourceIdentity = dict[str, str | int | None]
"""What positions count in, such as a dataset or a topic; JSON-able."""

BEGINNING = (0, 0, 0, 0)

_WAKE_SECONDS = 0.1


@dataclass(frozen=True)
class PartitionEvents:
    """Events of one partition, in the order of the log.

    Attributes:
        events: columns of ``EVENT_TYPES``, each ``[n]``.
        logged: features of those that carry them; positions are among these events.
        arrived_ms: ``[n]`` int64, as of :class:`EventBatch`.
    """

    events: Columns
    logged: RequestFeatures
    arrived_ms: np.ndarray

    def __len__(self) -> int:
        return len(self.arrived_ms)


@dataclass(frozen=True)
class EventBatch:
    """Events of one rank, in order.

    Attributes:
        events: columns of ``EVENT_TYPES``, each ``[n]``.
        logged: features of those that carry them.
        partition: ``[n]`` int32.
        arrived_ms: ``[n]`` int64, milliseconds UTC by the clock when each event came to the source: when its message
            was sent, or when it was due in a replay.
        position: after the batch, of all partitions of the rank.
    """

    events: Columns
    logged: RequestFeatures
    partition: np.ndarray
    arrived_ms: np.ndarray
    position: Position

    def __len__(self) -> int:
        return len(self.partition)

    def since(self, time_ms: int) -> EventBatch:
        """Without the events before a time."""
        at = np.flatnonzero(self.events["time_ms"] >= time_ms)
        if len(at) == len(self):
            return self
        events = {name: column[at] for name, column in self.events.items()}
        return replace(
            self,
            events=events,
            partition=self.partition[at],
            arrived_ms=self.arrived_ms[at],
            logged=self.logged.take(at),
        )

    def by_partition(self) -> Iterator[tuple[int, PartitionEvents]]:
        """The events of each partition that has any."""
        for partition in np.unique(self.partition).tolist():
            at = np.flatnonzero(self.partition == partition)
            events = {name: column[at] for name, column in self.events.items()}
            yield partition, PartitionEvents(events, self.logged.take(at), self.arrived_ms[at])


@dataclass(frozen=True)
class Lag:
    """How far what was handed out is behind the stream.

    Attributes:
        waiting: rows or messages of the rank's partitions that were not handed out; of messages of several events,
            messages.
        event_ms: from the last event handed out to the newest one known of, in event time.
        wait_ms: since the last event handed out came to the source, in clock time; 0 if nothing waits.
    """

    waiting: int
    event_ms: int
    wait_ms: int

    def __str__(self) -> str:
        return (
            f"{self.waiting:,} waiting, {self.event_ms / 1000:,.1f} s of events and {self.wait_ms / 1000:,.1f} s behind"
        )


class EventFeed(Protocol):
    """What a kind of source does for a :class:`StreamReader`, whose thread runs it."""

    @property
    def position(self) -> Position:
        """Where it starts."""

    def batches(self, stop: threading.Event) -> Generator[EventBatch]:
        """The batches in order; ends soon after ``stop`` is set, and lets go of all it holds."""

    def ahead(self, position: Position) -> tuple[int, int]:
        """Rows or messages known to be behind a position, and the time of the newest event known of.

        Asked from another thread than that of :meth:`batches`.
        """


class Source(Protocol):
    """A stream of events."""

    @property
    def partitions(self) -> int:
        """Number of partitions."""

    @property
    def identity(self) -> SourceIdentity:
        """What its positions count in; to be saved with them, and compared by :func:`check_identity`."""

    def open(
        self, partitions: Sequence[int], position: Mapping[int, Sequence[int]] | None = None, slice_ms: int = 0
    ) -> StreamReader:
        """Read some partitions.

        Args:
            partitions: of the rank.
            position: to go on from, over the partitions of all ranks; None begins anew.
            slice_ms: batches end before the next multiple of so many milliseconds of the merged event time, whatever
                their size; 0: nowhere.

        Raises:
            UserError: the position does not fit the source, or is no longer there.
        """


class StreamReader:
    """Reads a stream in a thread, at most ``queue_batches`` batches ahead of who takes them.

    Use it as a context manager, or call :meth:`close`: it stops the thread and what that holds.

    Attributes:
        position: after the last batch taken; at first where reading started.
        finished: all of the stream was taken.
    """

    def __init__(self, feed: EventFeed, queue_batches: int) -> None:
        self._feed = feed
        self._batches: queue.Queue[EventBatch | BaseException | None] = queue.Queue(queue_batches)
        self._stop = threading.Event()
        self._last: EventBatch | None = None
        self.position: Position = feed.position
        self.finished = False
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)
        self._thread.start()

    def take(self, timeout: float | None = None) -> EventBatch | None:
        """The next batch, or None if none came in ``timeout`` seconds or the stream has :attr:`finished`.

        Raises:
            UserError: why the stream cannot be read on.
        """
        if self.finished:
            return None
        try:
            item = self._batches.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, EventBatch):
            self.position = item.position
            if len(item):
                self._last = item
            return item
        self.finished = True
        if item is not None:
            raise item
        return None

    def __iter__(self) -> Iterator[EventBatch]:
        """The batches until the stream ends."""
        while (batch := self.take()) is not None:
            yield batch

    def lag(self) -> Lag:
        """Of what was taken."""
        waiting, newest_ms = self._feed.ahead(self.position)
        if self._last is None:
            return Lag(waiting, 0, 0)
        taken_ms, arrived_ms = int(self._last.events["time_ms"].max()), int(self._last.arrived_ms[-1])
        wait_ms = max(0, round(time.time() * 1000) - arrived_ms) if waiting else 0
        return Lag(waiting, max(0, newest_ms - taken_ms), wait_ms)

    def close(self) -> None:
        """Stop reading; what was read ahead is dropped."""
        self._stop.set()
        self._thread.join()
        self.finished = True

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            with closing(self._feed.batches(self._stop)) as batches:
                for batch in batches:
                    self._put(batch)
        except BaseException as error:  # handed to who takes the batches
            end = error
        self._put(end)

    def _put(self, item: EventBatch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._batches.put(item, timeout=_WAKE_SECONDS)
                return
            except queue.Full:
                continue


def starting_position(
    partitions: Sequence[int],
    position: Mapping[int, Sequence[int]] | None,
    of_source: int,
    beginning: Callable[[int], Sequence[int]] = lambda partition: BEGINNING,
) -> Position:
    """The entries of a saved position that a rank needs, or the beginning of each of its partitions.

    Args:
        partitions: of the rank.
        position: of all ranks; None begins anew.
        of_source: partitions that the source has.
        beginning: of a partition.

    Raises:
        UserError: the position is of a source with another number of partitions.
    """
    if position is None:
        return {partition: list(beginning(partition)) for partition in sorted(partitions)}
    if sorted(position) != list(range(of_source)):
        raise UserError(
            f"the saved stream position has partitions {_ranges(position)}, the source has 0 to {of_source - 1}: a "
            f"user's events would be looked for in another partition; go on with the source that the run began with"
        )
    return {partition: [int(part) for part in position[partition]] for partition in sorted(partitions)}


def check_identity(saved: SourceIdentity, now: SourceIdentity) -> None:
    """A position counts in what it was saved of.

    Raises:
        UserError: the source is another one; names what differs.
    """
    for key in saved.keys() | now.keys():
        if saved.get(key) != now.get(key):
            raise UserError(
                f"the saved stream position is of {key} {saved.get(key)!r}, the stream now has {now.get(key)!r}: "
                f"go on with the source that the run began with, or start a new run"
            )


def _ranges(partitions: Iterable[int]) -> str:
    ordered = sorted(partitions)
    if ordered == list(range(len(ordered))):
        return f"0 to {len(ordered) - 1}" if ordered else "none"
    return ", ".join(map(str, ordered))
