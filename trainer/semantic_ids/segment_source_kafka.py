"""Source of segments: a Kafka topic, of which one process reads all partitions.

A message has one segment, several on lines of their own, or a JSON array of them. No offset is committed: the position
has the next offset of each partition, and the cache stores it together with the vectors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.semantic_ids.segment_source import Clock, LiveSegment, RejectedMessage, SourceBatch, parse_segment
from trainer.stream.sources.json_events import split_events
from trainer.stream.sources.kafka_client import (
    BrokerStatus,
    library,
    make_consumer,
    retry,
    topic_partitions,
    watermarks,
)
from trainer.stream.sources.kafka_source import without_gaps

CHECK_SECONDS = 5.0
"""Time without a message after which the brokers are asked if they are there."""


_KEYS = re.compile(r"\bstream\.(brokers|topic|properties|begin|on_gap|retry_seconds)\b")


@contextmanager
def _keys_of_follow() -> Iterator[None]:
    """Name the keys of the section ``[follow]`` in messages of the client, which other jobs have in ``[stream]``."""
    try:
        yield
    except UserError as error:
        raise UserError(_KEYS.sub(r"follow.\1", str(error))) from None


class KafkaSegments:
    """Source of the segments of a topic.

    Args:
        config: brokers, topic, and behaviour at its beginning, at gaps and at its end.
        position: position to start from: ``CLUSTER/TOPIC/PARTITION`` -> next offset.
        clock: clock.

    Raises:
        UserError: the brokers or the topic are not available within ``retry_seconds``, messages at the position are
            gone, or confluent-kafka is not installed.
    """

    @_keys_of_follow()
    def __init__(self, config: StreamConfig, position: Mapping[str, Any], clock: Clock) -> None:
        self._kafka, self._config, self._clock = library(), config, clock
        self._status = BrokerStatus()
        self._consumer = make_consumer(config, self._status)
        self._next: dict[int, int] = {}
        try:
            partitions, self._cluster = self._topic()
            # A copy of the topic in another cluster has other offsets; it is read from its beginning.
            saved = {p: position[self._key(p)] for p in range(partitions) if self._key(p) in position}
            held = watermarks(self._consumer, range(partitions), config, self._status)
            # A partition that was added while the job was away is read from its beginning.
            bound = 0 if config.begin == "earliest" or saved else 1
            start = without_gaps({p: [int(place), 0, 0, 0] for p, place in saved.items()}, held, config)
            self._end = {p: high for p, (_, high) in held.items()}
            # From now on polling would take a message away.
            self._status.poll = None
            self._assign({p: start[p][0] if p in start else held[p][bound] for p in range(partitions)})
        except BaseException:
            self._consumer.close()
            raise
        self._checked = time.monotonic()

    @property
    def finished(self) -> bool:
        """True after the last message that the topic had at the start, with ``until_end``."""
        return self._config.until_end and all(self._next[p] >= end for p, end in self._end.items())

    @_keys_of_follow()
    def take(self, limit: int, timeout: float) -> SourceBatch:
        """Return the next messages; see :class:`trainer.semantic_ids.segment_source.SegmentSource`."""
        batch = SourceBatch({})
        now_ms = round(self._clock.time() * 1000)
        messages = [] if self.finished else self._consumer.consume(limit, timeout)
        for message in messages:
            p, error = message.partition(), message.error()
            if error is not None:
                self._on_error(error, p, message.offset())
            # After a seek, the library may deliver messages again that were already read.
            elif message.offset() >= self._next[p]:
                self._add(batch, message, now_ms)
                self._next[p] = message.offset() + 1
        if any(message.error() is None for message in messages):
            self._checked = time.monotonic()
        elif time.monotonic() - self._checked >= CHECK_SECONDS:
            self._check_topic()
        batch.position = {self._key(p): place for p, place in self._next.items()}
        return batch

    def close(self) -> None:
        """Close the consumer."""
        self._consumer.close()

    def _add(self, batch: SourceBatch, message: Any, now_ms: int) -> None:
        place = f"{message.topic()}/{message.partition()}/{message.offset()}"
        value = message.value() or b""
        pieces = split_events(value)
        if not pieces or not value.strip():
            batch.rejected.append(RejectedMessage(place, "an empty message; a JSON object is expected", value))
            return
        for number, piece in enumerate(pieces):
            parsed = parse_segment(piece, now_ms, place if len(pieces) == 1 else f"{place} segment {number}")
            if isinstance(parsed, LiveSegment):
                batch.segments.append(parsed)
            else:
                batch.rejected.append(parsed)

    def _on_error(self, error: Any, p: int, offset: int | None) -> None:
        kafka = self._kafka.KafkaError
        if error.code() == kafka._PARTITION_EOF:
            if offset is not None and offset > self._next[p]:
                # Transaction markers have offsets too, but are never delivered.
                self._next[p] = offset
        elif error.code() in (kafka._AUTO_OFFSET_RESET, kafka.OFFSET_OUT_OF_RANGE):
            # The broker has deleted messages before they were read.
            held = watermarks(self._consumer, [p], self._config, self._status)
            moved = without_gaps({p: [self._next[p], 0, 0, 0]}, held, self._config)[p][0]
            self._consumer.incremental_unassign([self._kafka.TopicPartition(self._config.topic, p)])
            self._assign({p: moved})
        elif error.fatal() or not error.retriable():
            raise UserError(f"topic {self._config.topic} partition {p}: cannot be read ({error.str()})")

    def _check_topic(self) -> None:
        """Check that brokers answer, which a quiet topic does not show, and read partitions that were added."""
        partitions, _ = self._topic()
        self._assign({p: 0 for p in range(partitions) if p not in self._next})
        self._checked = time.monotonic()

    def _topic(self) -> tuple[int, str | None]:
        return retry(
            lambda timeout: topic_partitions(self._consumer, self._config.topic, timeout), self._config, self._status
        )

    def _assign(self, offsets: Mapping[int, int]) -> None:
        self._next |= offsets
        if offsets:
            self._consumer.incremental_assign(
                [self._kafka.TopicPartition(self._config.topic, p, offset) for p, offset in offsets.items()]
            )

    def _key(self, p: int) -> str:
        return f"{self._cluster}/{self._config.topic}/{p}"
