"""Interface of event sources, and the reader of a rank: in a defined order, ahead of training, from any position.

A source has partitions. A user's events are all in one of them, and rank ``p % world`` reads partition ``p``. A source
that is opened at a position gives exactly the events after it. Every batch carries the position after it. If that
position is saved together with the model that the batch has changed, every event is applied exactly once: the position
is stored nowhere else, and events that were read ahead are read again.

**Position.** Partition -> ``[place, inside, latest_ms, rejected]``: the next row (files) or offset (Kafka), the number
of finished events in the message there, the latest time among the events so far, and the number of rejected events. The
union over the ranks is the position of the job, from which any number of ranks can resume.

**Order.** Events of a partition keep the order of the log. The partitions of a rank are merged by event time. The next
event depends on the position and the content of the log, not on arrival times or on the portions that were read.
"""

from __future__ import annotations

import queue
import threading
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
"""Positions of a stream by partition, ``[place, inside, latest_ms, rejected]``, see above; ready for JSON."""

SourceIdentity = dict[str, str | int | None]
"""Identity of the log that positions refer to, such as a dataset or a topic; ready for JSON."""

_WAKE_SECONDS = 0.1


@dataclass(frozen=True)
class PartitionEvents:
    """Events of one partition, in the order of the log.

    Attributes:
        events: columns of ``EVENT_TYPES``, each ``[n]``.
        logged: logged features of some of the events; ``logged.at`` are positions among these events.
        arrived_ms: ``[n]`` int64, as in :class:`EventBatch`.
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
        logged: logged features of some of the events.
        partition: ``[n]`` int32.
        arrived_ms: ``[n]`` int64, clock time in milliseconds UTC at which each event came to the source: when its
            message was sent, or when it was due in a replay.
        position: position after the batch, over all partitions of the rank.
    """

    events: Columns
    logged: RequestFeatures
    partition: np.ndarray
    arrived_ms: np.ndarray
    position: Position

    def __len__(self) -> int:
        return len(self.partition)

    def since(self, time_ms: int) -> EventBatch:
        """Return the batch without the events before ``time_ms``."""
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
        """Yield the events of each partition in the batch."""
        for partition in np.unique(self.partition).tolist():
            at = np.flatnonzero(self.partition == partition)
            events = {name: column[at] for name, column in self.events.items()}
            yield partition, PartitionEvents(events, self.logged.take(at), self.arrived_ms[at])


@dataclass(frozen=True)
class Lag:
    """Distance of a reader behind the end of the stream.

    Attributes:
        waiting: number of rows or messages of the rank's partitions that were not taken yet.
        event_ms: event time from the last event taken to the newest known event.
    """

    waiting: int
    event_ms: int


class EventFeed(Protocol):
    """Producer of the batches of a :class:`StreamReader`, which runs it in its thread."""

    @property
    def position(self) -> Position:
        """Position at which it starts."""

    def batches(self, stop: threading.Event) -> Generator[EventBatch]:
        """Yield the batches in order; ends soon after ``stop`` is set, and releases its resources."""

    def backlog(self, position: Position) -> tuple[int, int]:
        """Return the number of known rows or messages after a position, and the time of the newest known event.

        It is called from another thread than :meth:`batches`.
        """


class Source(Protocol):
    """A stream of events."""

    @property
    def partitions(self) -> int:
        """Number of partitions."""

    @property
    def identity(self) -> SourceIdentity:
        """Identity that is saved with positions, and compared by :func:`check_identity`."""

    def open(
        self, partitions: Sequence[int], position: Mapping[int, Sequence[int]] | None = None, slice_ms: int = 0
    ) -> StreamReader:
        """Open a reader of some partitions; it starts to read when it is entered as a context manager.

        Args:
            partitions: partitions of the rank.
            position: position to start from, over the partitions of all ranks; None starts at the beginning.
            slice_ms: batches also end at each multiple of this many milliseconds of merged event time; 0 for none.

        Raises:
            UserError: the position does not fit the source, or its messages are gone.
        """


class StreamReader:
    """Reads a stream in a thread, at most ``queue_batches`` batches ahead of the consumer.

    Use it as a context manager: entering starts the thread, leaving stops it and releases the feed's resources.

    Attributes:
        position: position after the last batch taken, or the start of reading.
        finished: True if the whole stream was taken, or the reader is closed.
    """

    def __init__(self, feed: EventFeed, queue_batches: int) -> None:
        self._feed = feed
        self._batches: queue.Queue[EventBatch | BaseException | None] = queue.Queue(queue_batches)
        self._stop = threading.Event()
        self._taken_ms: int | None = None
        self.position: Position = feed.position
        self.finished = False
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)

    def start(self) -> None:
        """Start to read ahead."""
        self._thread.start()

    def take(self, timeout: float | None = None) -> EventBatch | None:
        """Return the next batch; None if none came in ``timeout`` seconds or the stream has :attr:`finished`.

        Raises:
            UserError: the stream cannot be read any further.
        """
        assert self._thread.ident is not None, "the reader was not started"
        if self.finished:
            return None
        try:
            item = self._batches.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, EventBatch):
            self.position = item.position
            # An empty batch only moves the position; the lag is measured from the last event.
            if len(item):
                self._taken_ms = int(item.events["time_ms"].max())
            return item
        self.finished = True
        if item is not None:
            raise item
        return None

    def __iter__(self) -> Iterator[EventBatch]:
        """Yield the batches until the stream ends."""
        while (batch := self.take()) is not None:
            yield batch

    def lag(self) -> Lag:
        """Return the distance of the batches taken behind the end of the stream."""
        waiting, newest_ms = self._feed.backlog(self.position)
        return Lag(waiting, 0 if self._taken_ms is None else max(0, newest_ms - self._taken_ms))

    def close(self) -> None:
        """Stop reading, and drop the batches that were read ahead."""
        self._stop.set()
        self._thread.join()
        self.finished = True

    def __enter__(self) -> StreamReader:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            # Closing the generator releases the feed's resources in this thread.
            with closing(self._feed.batches(self._stop)) as batches:
                for batch in batches:
                    self._put(batch)
        except BaseException as error:  # ``take`` raises it in the consumer's thread
            end = error
        self._put(end)

    def _put(self, item: EventBatch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                # With a timeout, so that ``close`` is noticed while the queue is full.
                self._batches.put(item, timeout=_WAKE_SECONDS)
                return
            except queue.Full:
                continue


def starting_position(
    partitions: Sequence[int],
    position: Mapping[int, Sequence[int]] | None,
    source_partitions: int,
    beginning: Callable[[int], Sequence[int]],
) -> Position:
    """Return the entries of a saved position for a rank's partitions, or the beginning of each partition.

    Args:
        partitions: partitions of the rank.
        position: saved position of all ranks; None starts at the beginning.
        source_partitions: number of partitions of the source.
        beginning: function from a partition to its beginning.

    Raises:
        UserError: the saved position has another number of partitions than the source.
    """
    if position is None:
        return {partition: list(beginning(partition)) for partition in sorted(partitions)}
    if sorted(position) != list(range(source_partitions)):
        raise UserError(
            f"the saved stream position has partitions {_ranges(position)}, the source has 0 to "
            f"{source_partitions - 1}: users would be read from other partitions; use the source that the run "
            f"started with"
        )
    return {partition: [int(part) for part in position[partition]] for partition in sorted(partitions)}


def check_identity(saved: SourceIdentity, now: SourceIdentity) -> None:
    """Check that a saved position belongs to this source.

    Raises:
        UserError: it belongs to another source; names the difference.
    """
    for key in saved.keys() | now.keys():
        if saved.get(key) != now.get(key):
            raise UserError(
                f"the saved stream position is of {key} {saved.get(key)!r}, the stream now has {now.get(key)!r}: "
                f"use the source that the run started with, or start a new run"
            )


def _ranges(partitions: Iterable[int]) -> str:
    """Return partitions as text for a message."""
    ordered = sorted(partitions)
    if ordered == list(range(len(ordered))):
        return f"0 to {len(ordered) - 1}" if ordered else "none"
    return ", ".join(map(str, ordered))
