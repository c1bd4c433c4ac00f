"""Kafka source: reads a topic keyed by user. Offsets are stored only in positions, and so in the checkpoints.

**Partitions.** The partitions of the topic are those of the job. In a topic of N partitions, partition p has the events
of the users with ``schema.partition_of(user_id, N) == p``, as ``limelight stream publish`` writes them, and rank
``p % world`` reads it. An event of a user in another partition is rejected, because another rank has that user's
visits; a topic of which many users are in other partitions is refused before that, see
``trainer.stream.sources.topic_check``. A topic of a producer with its own partitioner is read with
``partitioner = "producer"``; then the producer must keep each user's messages in one partition and in order. Users in
two partitions are counted, see ``trainer.stream.live.user_partitions``. A topic whose number of partitions has changed
is refused, because its users have moved.

**Exactly once.** Partitions are assigned, not subscribed to, and no offset is committed. A reader that is opened at a
position seeks to it. Messages at the position that the broker has deleted are a gap; a gap is an error unless
``on_gap`` accepts it. An offset beyond the end of the topic is always an error, because the topic is another one.
Messages: see ``trainer.stream.sources.message_codec``.

**Order.** Stored messages are read in the order that ``trainer.stream.sources.source`` defines. At the end of a live
topic, batches are handed out after ``linger_seconds`` and silent partitions are not waited for, so there the batches
depend on the arrival of messages; with ``until_end`` they never do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from itertools import chain, groupby
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
    read_ranges,
    retry,
    topic_partitions,
    watermarks,
)
from trainer.stream.sources.kafka_dead_letters import DeadLetter, DeadLetterProducer
from trainer.stream.sources.logged_features import empty_features
from trainer.stream.sources.message_codec import DecodedMessages, MessageCodec
from trainer.stream.sources.source import EventBatch, Position, SourceIdentity, StreamReader, starting_position
from trainer.stream.sources.time_merge import TimeMerge
from trainer.stream.sources.topic_check import TopicCheck

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_MAX_MESSAGES = 10_000
_CHECK_SECONDS = 5.0


class KafkaSource:
    """Source of the events of a Kafka topic; call :meth:`connect` first.

    Args:
        config: config of the stream.
        spec: description of the job's dataset, which names the behaviours and the logged features.
    """

    def __init__(self, config: StreamConfig, spec: DatasetSpec) -> None:
        self._config, self._spec = config, spec
        self._partitions = 0
        self._cluster: str | None = None

    def connect(self) -> KafkaSource:
        """Ask the brokers for the topic's partitions and the cluster's id; return this source.

        Raises:
            UserError: the brokers or the topic are not available within ``retry_seconds``, or confluent-kafka is not
                installed.
        """
        status = BrokerStatus()
        consumer = make_consumer(self._config, status)
        try:
            self._partitions, self._cluster = retry(
                lambda timeout: topic_partitions(consumer, self._config.topic, timeout), self._config, status
            )
        finally:
            consumer.close()
        return self

    @property
    def partitions(self) -> int:
        """Number of partitions of the topic, 0 before :meth:`connect`."""
        return self._partitions

    @property
    def identity(self) -> SourceIdentity:
        """Topic and id of its cluster, because a copy of the topic in another cluster has other offsets."""
        return {"source": "kafka", "topic": self._config.topic, "cluster": self._cluster}

    def open(
        self, partitions: Sequence[int], position: Mapping[int, Sequence[int]] | None = None, slice_ms: int = 0
    ) -> StreamReader:
        """Open a reader of some partitions; see :class:`trainer.stream.sources.source.Source`."""
        status = BrokerStatus()
        consumer = make_consumer(self._config, status)
        try:
            # The position is checked now, so that a gap is reported before training starts.
            held = watermarks(consumer, sorted(partitions), self._config, status)
            bound = 0 if self._config.begin == "earliest" else 1
            start = starting_position(
                partitions, position, self.partitions, lambda partition: (held[partition][bound], 0, 0, 0)
            )
            start = without_gaps(start, held, self._config)
        except BaseException:
            consumer.close()
            raise
        feed = _KafkaFeed(consumer, status, start, held, self._partitions, self._config, self._spec, slice_ms)
        try:
            feed.check_settings(held, resumed=position is not None)
        except BaseException:
            consumer.close()
            raise
        return StreamReader(feed, self._config.queue_batches)


def without_gaps(position: Position, held: Mapping[int, tuple[int, int]], config: StreamConfig) -> Position:
    """Return the position, moved past gaps if the job accepts them.

    Args:
        position: position of some partitions.
        held: for each partition the offset of its first message, and the offset after its last one.
        config: ``on_gap`` tells if gaps are accepted.

    Raises:
        UserError: messages at the position are gone, which names each gap; or the position is beyond the topic's end.
    """
    beyond = [p for p, (place, *_) in position.items() if place > held[p][1]]
    if beyond:
        p = beyond[0]
        raise UserError(
            f"topic {config.topic} partition {p}: the saved position is offset {position[p][0]:,}, the topic ends at "
            f"{held[p][1]:,}: it is not the topic that the run started with, or it has lost messages; start a new run"
        )
    gone = [p for p, (place, *_) in position.items() if place < held[p][0]]
    if not gone:
        return position
    count = sum(held[p][0] - position[p][0] for p in gone)
    gaps = "; ".join(f"partition {p} is at offset {position[p][0]:,} and starts at {held[p][0]:,}" for p in gone[:8])
    gap = f"topic {config.topic} no longer holds {count:,} messages that were not read: {gaps}"
    if len(gone) > 8:
        gap += f"; and {len(gone) - 8} more"
    if config.on_gap == "error":
        raise UserError(f'{gap}; stream.on_gap = "earliest" continues without them')
    logger.info(f"stream: {gap}; continuing without them")
    # The latest time and the count of rejected events stay; only the place moves.
    moved = {p: [held[p][0], 0, *position[p][2:]] for p in gone}
    return {**position, **moved}


def _places(messages: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return partition and offset of each message, ``[n]`` int64."""
    return (
        np.array([message.partition() for message in messages], np.int64),
        np.array([message.offset() for message in messages], np.int64),
    )


class _KafkaFeed:
    """Feed of some partitions of a topic, merged by event time.

    Everything except :meth:`check_settings` and :meth:`backlog` runs in the thread of the reader.
    """

    def __init__(
        self,
        consumer: Any,
        status: BrokerStatus,
        position: Position,
        held: Mapping[int, tuple[int, int]],
        partitions: int,
        config: StreamConfig,
        spec: DatasetSpec,
        slice_ms: int,
    ) -> None:
        self._kafka = library()
        self._consumer, self._status, self.position, self._config = consumer, status, position, config
        self._partitions, self._no_features = partitions, empty_features(spec)
        self._ticks_ms = [slice_ms] if slice_ms else []
        self._codec = MessageCodec(config.format, spec, round(config.future_hours * 3_600_000))
        self._dead_letters = DeadLetterProducer(config)
        self._check = TopicCheck(config, partitions)
        self._merge = TimeMerge(position)
        self._next = {p: at[0] for p, at in position.items()}
        self._inside = {p: (at[0], at[1]) for p, at in position.items() if at[1]}
        self._rejected = {p: at[3] for p, at in position.items()}
        # With ``until_end`` the end is fixed here; ``_high`` follows a growing topic for the lag.
        self._end = {p: high for p, (_, high) in held.items()}
        self._high = dict(self._end)
        self._newest_ms = 0
        # A partition is paused at this many events; by then, as many again may have been fetched.
        self._per_partition = max(1, config.buffer_events // (2 * max(1, len(position))))
        # Before the first message its size is unknown; a large guess keeps memory bounded.
        self._per_message = float(self._per_partition)
        self._paused: set[int] = set()
        self._at_end: set[int] = set()
        now = time.monotonic()
        self._heard = dict.fromkeys(position, now)
        self._checked = self._handed_out = now

    def batches(self, stop: threading.Event) -> Generator[EventBatch]:
        """Yield the batches in order; see :class:`trainer.stream.sources.source.EventFeed`."""
        try:
            # From now on polling would take a message away.
            self._status.poll = None
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
                if rest and (empty := self._skip_rejected()) is not None:
                    yield empty
                if ended:
                    return
                self._pause_partitions()
                self._check_topic()
        finally:
            self._consumer.close()

    def check_settings(self, held: Mapping[int, tuple[int, int]], resumed: bool) -> None:
        """Check with the messages around the position that the topic fits the settings of the job.

        Raises:
            UserError: it has another partitioner or format, or these messages cannot be read.
        """
        ranges = self._check.ranges(self._next, held, resumed)
        messages = list(chain.from_iterable(read_ranges(self._config.topic, ranges, self._config)))
        if messages:
            partition, offset = _places(messages)
            order = np.lexsort([offset, partition])
            self._check.add(partition[order], offset[order], self._decode([messages[at] for at in order.tolist()]))

    def _decode(self, messages: Sequence[Any]) -> DecodedMessages:
        """Decode messages, and compare their partitions with their users if the partitioner is our own."""
        partition = _places(messages)[0] if self._config.partitioner == "limelight" else None
        now_ms = round(time.time() * 1000)
        return self._codec.decode([message.value() for message in messages], now_ms, partition, self._partitions)

    def _take(self, rest: bool) -> EventBatch | None:
        return self._merge.take(self._config.batch_events, ticks_ms=self._ticks_ms, rest=rest)

    def backlog(self, position: Position) -> tuple[int, int]:
        """Return the backlog after a position; see :class:`trainer.stream.sources.source.EventFeed`."""
        return sum(max(0, self._high[p] - at[0]) for p, at in position.items()), self._newest_ms

    def _assign(self, offsets: Mapping[int, int]) -> None:
        self._consumer.incremental_assign(
            [self._kafka.TopicPartition(self._config.topic, p, offset) for p, offset in offsets.items()]
        )

    def _poll(self) -> None:
        """Consume and decode the messages that have arrived."""
        wanted = min(max(1, int(self._per_partition / self._per_message)), _MAX_MESSAGES)
        messages = self._consumer.consume(wanted, _POLL_SECONDS)
        if messages:
            # A message is a sign of life of the brokers.
            self._status.down_since = None
        # The end of a partition is reported after its messages, so messages come first.
        if good := [message for message in messages if message.error() is None]:
            self._append(good)
        for message in messages:
            if message.error() is not None:
                self._on_error(message.error(), message.partition(), message.offset())

    def _append(self, messages: list[Any]) -> None:
        """Decode messages, add their events to the merge, and send rejected ones to the dead letters."""
        partition, offset = _places(messages)
        order = np.argsort(partition, kind="stable")
        # After a pause or a seek, the library may deliver messages again that were already read.
        wanted = offset >= np.array([self._next[p] for p in partition.tolist()])
        if self._config.until_end:
            wanted &= offset < np.array([self._end[p] for p in partition.tolist()])
        order = order[wanted[order]]
        if not len(order):
            return
        partition, offset = partition[order], offset[order]
        chosen = [messages[place] for place in order.tolist()]
        decoded = self._decode(chosen)
        # Before the first dead letter is written and before anything is trained on.
        self._check.add(partition, offset, decoded)
        arrived = np.array([message.timestamp()[1] for message in chosen], np.int64)
        # A message without a timestamp arrives now.
        arrived[arrived < 0] = round(time.time() * 1000)
        self._per_message = float(decoded.sizes.max())
        edges = np.flatnonzero(np.diff(partition)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(partition)]
        letters: list[DeadLetter] = []
        for start, stop in zip(starts, stops, strict=True):
            letters += self._append_partition(chosen, offset, arrived, decoded, start, stop)
        self._dead_letters.send(letters)

    def _append_partition(
        self,
        messages: Sequence[Any],
        offset: np.ndarray,
        arrived: np.ndarray,
        decoded: DecodedMessages,
        start: int,
        stop: int,
    ) -> list[DeadLetter]:
        """Add the events of messages ``start`` to ``stop`` to their partition; return the dead letters."""
        p = int(messages[start].partition())
        first, last = np.searchsorted(decoded.message, [start, stop])
        message, inside = decoded.message[first:last], decoded.inside[first:last]
        events = {name: column[first:last] for name, column in decoded.events.items()}
        logged = decoded.logged.part(int(first), int(last))
        bad = [bad for bad in decoded.rejected if start <= bad.message < stop]
        resumed = self._inside.pop(p, None)
        if resumed is not None and offset[start] == resumed[0]:
            # The position is inside this message; its first events are done.
            after = (message > start) | (inside >= resumed[1])
            events = {name: column[after] for name, column in events.items()}
            logged = logged.take(np.flatnonzero(after))
            message, inside = message[after], inside[after]
            bad = [entry for entry in bad if (entry.message, entry.inside) >= (start, resumed[1])]
        # The position after the last event of a message is the next message.
        done = inside + 1 == decoded.sizes[message]
        # Message and number within it as one sortable key: the count of rejected events before each event.
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
        # Silence is counted from the last message, good or not.
        self._heard[p] = time.monotonic()
        self._at_end.discard(p)
        return [
            DeadLetter(messages[place], tuple(rejected))
            for place, rejected in groupby(bad, lambda entry: entry.message)
        ]

    def _on_error(self, error: Any, p: int, offset: int | None) -> None:
        """Handle an error message: the end of a partition, a deleted offset, or a failure."""
        kafka = self._kafka.KafkaError
        if error.code() == kafka._PARTITION_EOF:
            self._at_end.add(p)
            if offset is not None and offset > self._next[p]:
                # Transaction markers have offsets too, but are never delivered.
                self._next[p] = offset
        elif error.code() in (kafka._AUTO_OFFSET_RESET, kafka.OFFSET_OUT_OF_RANGE):
            self._reopen(p)
        elif error.code() in (kafka.UNKNOWN_TOPIC_OR_PART, kafka._UNKNOWN_TOPIC, kafka._UNKNOWN_PARTITION):
            raise UserError(f"topic {self._config.topic} partition {p} does not exist any more ({error.str()})")
        elif error.fatal() or not error.retriable():
            raise UserError(f"topic {self._config.topic} partition {p}: cannot be read ({error.str()})")

    def _reopen(self, p: int) -> None:
        """Continue after a gap: the broker deleted messages before they were read."""
        held = watermarks(self._consumer, [p], self._config, self._status)
        at = [self._next[p], 0, 0, 0]
        self._next[p] = without_gaps({p: at}, held, self._config)[p][0]
        self._consumer.incremental_unassign([self._kafka.TopicPartition(self._config.topic, p)])
        self._paused.discard(p)
        self._assign({p: self._next[p]})

    def _wait_for_partitions(self) -> None:
        """Tell the merge to wait only for partitions that may still bring events soon."""
        now = time.monotonic()
        for p in self._next:
            if self._config.until_end:
                awaited = self._next[p] < self._end[p]
            else:
                awaited = p not in self._at_end or now - self._heard[p] < self._config.idle_seconds
            self._merge.wait_for(p, awaited)

    def _skip_rejected(self) -> EventBatch | None:
        """Return an empty batch whose position is after the rejected messages at the end of the topic, or None."""
        # While events are in memory, the next batch brings its own position.
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
        return EventBatch(no_events(), self._no_features, empty.astype(np.int32), empty, self._merge.position)

    def _pause_partitions(self) -> None:
        """Pause partitions that are far ahead, and resume them when the others have caught up."""
        full = {p for p in self._next if self._merge.held(p) >= self._per_partition} - self._paused
        ready = {p for p in self._paused if self._merge.held(p) <= self._per_partition // 2}
        topic = self._config.topic
        if full:
            # Pausing drops prefetched messages; a resumed partition continues after the last consumed one.
            self._consumer.pause([self._kafka.TopicPartition(topic, p) for p in full])
        if ready:
            self._consumer.resume([self._kafka.TopicPartition(topic, p) for p in ready])
        self._paused = (self._paused | full) - ready

    def _check_topic(self) -> None:
        """From time to time, update the topic's end and check that it is unchanged and that brokers answer."""
        now = time.monotonic()
        if now - self._checked < (_CHECK_SECONDS if self._status.down_since is None else _POLL_SECONDS):
            return
        for p in self._high:
            cached = self._consumer.get_watermark_offsets(
                self._kafka.TopicPartition(self._config.topic, p), cached=True
            )
            if cached is not None:
                self._high[p] = max(self._high[p], int(cached[1]))
        # A request also finds out that the brokers are gone, which a quiet topic does not show.
        count, _ = retry(
            lambda timeout: topic_partitions(self._consumer, self._config.topic, timeout), self._config, self._status
        )
        if count != self._partitions:
            raise UserError(
                f"topic {self._config.topic} has {count} partitions now instead of {self._partitions}: users have "
                f"moved to other partitions; start a new run"
            )
        self._status.down_since, self._checked = None, time.monotonic()
