"""Reads a Kafka topic keyed by user; offsets are in the positions, and so in the checkpoints, and nowhere else.

**Partitions.** The topic's partitions are the job's: with N of them, partition p has the events of the users whose
``schema.partition_of(user_id, N)`` is p, which is what ``limelight stream publish`` writes, and rank ``p % world``
reads it. Messages of a user elsewhere are rejected, since another rank would have its visits. Topics of producers with
a partitioner of their own are read with ``partitioner = "producer"``: what counts is that a user's messages are in one
partition and in order, which is then taken on trust. A topic whose number of partitions has changed is refused: users
have moved.

**Exactly once.** Partitions are assigned, not subscribed to; nothing is committed. A reader opened at a position seeks
to it. What the broker no longer holds is a gap, and refused unless ``on_gap`` says otherwise; an offset that the topic
has not reached is always refused, since it is another topic. Messages: see ``trainer.stream.sources.message_codec``.

**Order.** A topic that holds enough is read in the order that ``trainer.stream.sources.source`` defines. At the end of
a live one, where a batch goes out after ``linger_seconds`` and silent partitions are not waited for, batches depend on
when messages come; with ``until_end`` they never do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.stream.labels.assembled_rows import no_events
from trainer.stream.sources.kafka_client import (
    BrokerStatus,
    library,
    make_consumer,
    retry,
    topic_partitions,
    watermarks,
)
from trainer.stream.sources.kafka_dead_letters import DeadLetter, DeadLetterProducer
from trainer.stream.sources.logged_features import empty_features
from trainer.stream.sources.message_codec import DecodedMessages, MessageCodec
from trainer.stream.sources.source import EventBatch, Position, SourceIdentity, StreamReader, starting_position
from trainer.stream.sources.time_merge import TimeMerge

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_MOST_MESSAGES = 10_000
_LOOK_SECONDS = 5.0


class KafkaSource:
    """The events of a topic.

    Args:
        config: of the stream.
        spec: of the dataset that the job is made for: its behaviours are the events, and its features are logged.

    Raises:
        UserError: the topic or its brokers were not there in ``retry_seconds``, or confluent-kafka is not installed.
    """

    def __init__(self, config: StreamConfig, spec: DatasetSpec) -> None:
        self._config, self._spec = config, spec
        trouble = BrokerStatus()
        consumer = make_consumer(config, trouble)
        try:
            self._partitions, self._cluster = retry(
                lambda timeout: topic_partitions(consumer, config.topic, timeout), config, trouble
            )
        finally:
            consumer.close()

    @property
    def partitions(self) -> int:
        """Of the topic."""
        return self._partitions

    @property
    def identity(self) -> SourceIdentity:
        """The topic and its cluster: offsets of a copy elsewhere differ."""
        return {"source": "kafka", "topic": self._config.topic, "cluster": self._cluster}

    def open(
        self, partitions: Sequence[int], position: Mapping[int, Sequence[int]] | None = None, slice_ms: int = 0
    ) -> StreamReader:
        """Read some partitions; see :class:`trainer.stream.sources.source.Source`."""
        trouble = BrokerStatus()
        consumer = make_consumer(self._config, trouble)
        try:
            held = watermarks(consumer, sorted(partitions), self._config, trouble)
            side = 0 if self._config.begin == "earliest" else 1
            start = starting_position(
                partitions, position, self.partitions, lambda partition: (held[partition][side], 0, 0, 0)
            )
            start = without_gaps(start, held, self._config)
        except BaseException:
            consumer.close()
            raise
        feed = _KafkaFeed(consumer, trouble, start, held, self._partitions, self._config, self._spec, slice_ms)
        return StreamReader(feed, self._config.queue_batches)


def without_gaps(position: Position, held: Mapping[int, tuple[int, int]], config: StreamConfig) -> Position:
    """The position, moved to what the broker holds where the job accepts that.

    Args:
        position: of some partitions.
        held: first offset of each, and the one behind its last.
        config: whether gaps are accepted.

    Raises:
        UserError: messages at the position are gone; names each gap.
    """
    beyond = [p for p, (place, *_) in position.items() if place > held[p][1]]
    if beyond:
        p = beyond[0]
        raise UserError(
            f"topic {config.topic} partition {p}: the saved position is offset {position[p][0]:,}, the topic ends at "
            f"{held[p][1]:,}: it is not the topic that the run began with, or has lost messages; start a new run"
        )
    gone = [p for p, (place, *_) in position.items() if place < held[p][0]]
    if not gone:
        return position
    count = sum(held[p][0] - position[p][0] for p in gone)
    gaps = "; ".join(f"partition {p} is at offset {position[p][0]:,} and begins at {held[p][0]:,}" for p in gone[:8])
    gap = f"topic {config.topic} no longer holds {count:,} messages that were not read: {gaps}"
    if len(gone) > 8:
        gap += f"; and {len(gone) - 8} more"
    if config.on_gap == "error":
        raise UserError(f'{gap}; stream.on_gap = "earliest" goes on without them')
    logger.info(f"stream: {gap}; going on without them")
    moved = {p: [held[p][0], 0, *position[p][2:]] for p in gone}
    return {**position, **moved}


class _KafkaFeed:
    """Some partitions of a topic, merged. All but :meth:`ahead` runs in the thread of the reader."""

    def __init__(
        self,
        consumer: Any,
        trouble: BrokerStatus,
        position: Position,
        held: Mapping[int, tuple[int, int]],
        partitions: int,
        config: StreamConfig,
        spec: DatasetSpec,
        slice_ms: int,
    ) -> None:
        self._kafka = library()
        self._consumer, self._trouble, self.position, self._config = consumer, trouble, position, config
        self._partitions, self._none = partitions, empty_features(spec)
        self._ticks_ms = [slice_ms] if slice_ms else []
        self._codec = MessageCodec(config.format, spec, round(config.future_hours * 3_600_000))
        self._dead = DeadLetterProducer(config)
        self._merge = TimeMerge(position)
        self._next = {p: at[0] for p, at in position.items()}
        self._inside = {p: (at[0], at[1]) for p, at in position.items() if at[1]}
        self._rejected = {p: at[3] for p, at in position.items()}
        self._end = {p: high for p, (_, high) in held.items()}
        self._high = dict(self._end)
        self._newest_ms = 0
        # A partition may have this much when it is held back, and get as much once more by then.
        self._per_partition = max(1, config.buffer_events // (2 * max(1, len(position))))
        # Until the first message has come, messages are taken to be large.
        self._per_message = float(self._per_partition)
        self._paused: set[int] = set()
        self._at_end: set[int] = set()
        now = time.monotonic()
        self._heard = dict.fromkeys(position, now)
        self._looked = self._handed_out = now

    def batches(self, stop: threading.Event) -> Generator[EventBatch]:
        """See :class:`trainer.stream.sources.source.EventFeed`."""
        try:
            self._trouble.serve = None
            self._assign(self._next)
            while not stop.is_set():
                self._poll()
                ended = self._config.until_end and all(self._next[p] >= self._end[p] for p in self._next)
                self._wait_for_partitions()
                lingered = time.monotonic() - self._handed_out >= self._config.linger_seconds
                rest = ended or (lingered and not self._config.until_end)
                while not stop.is_set() and (batch := self._take(rest)) is not None:
                    yield batch
                    self._handed_out = time.monotonic()
                if rest and (passed := self._passed()) is not None:
                    yield passed
                if ended:
                    return
                self._hold_back()
                self._look_after()
        finally:
            self._consumer.close()

    def _take(self, rest: bool) -> EventBatch | None:
        return self._merge.take(self._config.batch_events, ticks_ms=self._ticks_ms, rest=rest)

    def ahead(self, position: Position) -> tuple[int, int]:
        """See :class:`trainer.stream.sources.source.EventFeed`."""
        return sum(max(0, self._high[p] - at[0]) for p, at in position.items()), self._newest_ms

    def _assign(self, offsets: Mapping[int, int]) -> None:
        self._consumer.incremental_assign(
            [self._kafka.TopicPartition(self._config.topic, p, offset) for p, offset in offsets.items()]
        )

    def _poll(self) -> None:
        """Take what has come and decode it."""
        wanted = min(max(1, int(self._per_partition / self._per_message)), _MOST_MESSAGES)
        messages = self._consumer.consume(wanted, _POLL_SECONDS)
        if messages:
            self._trouble.since = None
        # The end of a partition is told behind its messages.
        if good := [message for message in messages if message.error() is None]:
            self._append(good)
        for message in messages:
            if message.error() is not None:
                self._on_error(message.error(), message.partition(), message.offset())

    def _append(self, messages: list[Any]) -> None:
        partition = np.array([message.partition() for message in messages])
        offset = np.array([message.offset() for message in messages])
        order = np.argsort(partition, kind="stable")
        # Partitions that were paused, or read from elsewhere, may bring what has been read.
        wanted = offset >= np.array([self._next[p] for p in partition.tolist()])
        if self._config.until_end:
            wanted &= offset < np.array([self._end[p] for p in partition.tolist()])
        order = order[wanted[order]]
        if not len(order):
            return
        partition, offset = partition[order], offset[order]
        chosen = [messages[place] for place in order.tolist()]
        checked = partition if self._config.partitioner == "limelight" else None
        decoded = self._codec.decode(
            [message.value() or b"" for message in chosen], round(time.time() * 1000), checked, self._partitions
        )
        arrived = np.array([message.timestamp()[1] for message in chosen])
        self._per_message = float(decoded.sizes.max())
        edges = np.flatnonzero(np.diff(partition)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(partition)]
        letters: list[DeadLetter] = []
        for start, stop in zip(starts, stops, strict=True):
            letters += self._append_partition(int(partition[start]), offset, arrived, decoded, start, stop)
        self._dead.send(letters, len(decoded.message))

    def _append_partition(
        self, p: int, offset: np.ndarray, arrived: np.ndarray, decoded: DecodedMessages, start: int, stop: int
    ) -> list[DeadLetter]:
        """Add what messages ``start`` to ``stop`` of a chunk have to a partition; the rejected, which is to be sent."""
        first, last = np.searchsorted(decoded.message, [start, stop])
        message, inside = decoded.message[first:last], decoded.inside[first:last]
        events = {name: column[first:last] for name, column in decoded.events.items()}
        logged = decoded.logged.part(int(first), int(last))
        bad = [bad for bad in decoded.rejected if start <= bad.message < stop]
        resumed = self._inside.pop(p, None)
        if resumed is not None and offset[start] == resumed[0]:
            # The first events of this message are before the position.
            after = (message > start) | (inside >= resumed[1])
            events = {name: column[after] for name, column in events.items()}
            logged = logged.take(np.flatnonzero(after))
            message, inside = message[after], inside[after]
            bad = [entry for entry in bad if (entry.message, entry.inside) >= (start, resumed[1])]
        done = inside + 1 == decoded.sizes[message]
        places = np.array([(entry.message << 32) + entry.inside for entry in bad], np.int64)
        self._merge.append(
            p,
            {
                **events,
                "arrived_ms": arrived[message],
                "place": offset[message] + done,
                "inside": np.where(done, 0, inside + 1),
                "rejected": self._rejected[p] + np.searchsorted(places, (message << 32) + inside),
            },
            logged,
        )
        if len(message):
            self._newest_ms = max(self._newest_ms, int(events["time_ms"].max()))
        self._rejected[p] += len(bad)
        self._next[p] = int(offset[stop - 1]) + 1
        self._heard[p] = time.monotonic()
        self._at_end.discard(p)
        return [DeadLetter(p, int(offset[entry.message]), entry.inside, entry.reason, entry.content) for entry in bad]

    def _on_error(self, error: Any, p: int, offset: int | None) -> None:
        kafka = self._kafka.KafkaError
        if error.code() == kafka._PARTITION_EOF:
            self._at_end.add(p)
            if offset is not None and offset > self._next[p]:
                # Marks of transactions have offsets too.
                self._next[p] = offset
        elif error.code() in (kafka._AUTO_OFFSET_RESET, kafka.OFFSET_OUT_OF_RANGE):
            self._reopen(p)
        elif error.code() in (kafka.UNKNOWN_TOPIC_OR_PART, kafka._UNKNOWN_TOPIC, kafka._UNKNOWN_PARTITION):
            raise UserError(f"topic {self._config.topic} partition {p} is gone ({error.str()})")
        elif error.fatal() or not error.retriable():
            raise UserError(f"topic {self._config.topic} partition {p}: cannot be read ({error.str()})")

    def _reopen(self, p: int) -> None:
        """The broker has dropped what was to be read next, because we are slower than it forgets."""
        held = watermarks(self._consumer, [p], self._config, self._trouble)
        at = [self._next[p], 0, 0, 0]
        self._next[p] = without_gaps({p: at}, held, self._config)[p][0]
        self._consumer.incremental_unassign([self._kafka.TopicPartition(self._config.topic, p)])
        self._paused.discard(p)
        self._assign({p: self._next[p]})

    def _wait_for_partitions(self) -> None:
        """Have the merge wait for the partitions that may still bring something soon."""
        now = time.monotonic()
        for p in self._next:
            if self._config.until_end:
                awaited = self._next[p] < self._end[p]
            else:
                awaited = p not in self._at_end or now - self._heard[p] < self._config.idle_seconds
            self._merge.wait_for(p, awaited)

    def _passed(self) -> EventBatch | None:
        """An empty batch whose position is behind what was rejected at the end of what is there."""
        if self._merge.events:
            return None
        moved = False
        for p, (place, _, latest_ms, rejected) in self._merge.position.items():
            if self._next[p] > place or self._rejected[p] > rejected:
                self._merge.skip_to(p, [self._next[p], 0, latest_ms, self._rejected[p]])
                moved = True
        empty = np.empty(0, np.int64)
        if not moved:
            return None
        return EventBatch(no_events(), self._none, empty.astype(np.int32), empty, self._merge.position)

    def _hold_back(self) -> None:
        """Fetch no more of partitions that are far ahead of the others, until those have come up."""
        full = {p for p in self._next if self._merge.held(p) >= self._per_partition} - self._paused
        ready = {p for p in self._paused if self._merge.held(p) <= self._per_partition // 2}
        topic = self._config.topic
        if full:
            # From where we are, not from where the library has read ahead to.
            self._consumer.pause([self._kafka.TopicPartition(topic, p) for p in full])
        if ready:
            self._consumer.resume([self._kafka.TopicPartition(topic, p) for p in ready])
        self._paused = (self._paused | full) - ready

    def _look_after(self) -> None:
        """Now and then: where the topic ends, whether it is still the same, whether brokers answer."""
        now = time.monotonic()
        if now - self._looked < (_LOOK_SECONDS if self._trouble.since is None else _POLL_SECONDS):
            return
        for p in self._high:
            cached = self._consumer.get_watermark_offsets(
                self._kafka.TopicPartition(self._config.topic, p), cached=True
            )
            if cached is not None:
                self._high[p] = max(self._high[p], int(cached[1]))
        count, _ = retry(
            lambda timeout: topic_partitions(self._consumer, self._config.topic, timeout), self._config, self._trouble
        )
        if count != self._partitions:
            raise UserError(
                f"topic {self._config.topic} has {count} partitions now instead of {self._partitions}: users are in "
                f"other partitions than before; start a new run"
            )
        self._trouble.since, self._looked = None, time.monotonic()
