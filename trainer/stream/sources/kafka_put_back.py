"""Puts dead letters back on the topic that they came from; see ``trainer.stream.sources.kafka_dead_letters``.

Only the rejected events of a message are put back, because the others are trained on. The key and the producer's
headers stay. A header ``limelight.put_back`` names the origin of the events: partition, offset and numbers in the
message, such as ``1:2345:0,3``.

**Every rejected event comes back once**, also if a job wrote its dead letter twice, and if this command was killed at
any moment and is repeated. The consumer group ``limelight-put-back-TOPIC`` holds two kinds of offsets, which are
committed together after every portion: the next dead letter, and for each partition of the topic an offset from which
on messages may have been put back that are not committed yet. A repeated command reads the topic from there, and finds
these messages by their headers. This needs no transactions. It holds for one command at a time, which is repeated after
the brokers have served the last requests of the killed one, and while they still have the letters that were put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.stream.sources.kafka_client import (
    BrokerStatus,
    library,
    make_consumer,
    make_producer,
    produce,
    read_ranges,
    retry,
    topic_partitions,
    watermarks,
    without_errors,
)
from trainer.stream.sources.kafka_dead_letters import HEADER_PREFIX, PUT_BACK_HEADER, own_headers
from trainer.stream.sources.message_codec import select_events

_Event = tuple[int, int, int]
"""Origin of an event: partition, offset, and number in the message."""


@dataclass
class PutBack:
    """Counts of dead letters.

    Attributes:
        messages: messages that were written to the topic.
        duplicates: letters of which every event was put back before, as a job that was killed writes them.
        foreign: letters of other topics, and messages that are no dead letters; they stay where they are.
    """

    messages: int = 0
    duplicates: int = 0
    foreign: int = 0


def put_back(config: StreamConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> PutBack:
    """Write the dead letters of a topic back to it, from the first one that was not put back before.

    Args:
        config: brokers, topic and dead-letter topic.
        progress: callback that gets the number of letters read, and of all letters.

    Raises:
        UserError: the brokers or a topic are not available, or a message cannot be written.
    """
    status = BrokerStatus()
    consumer = make_consumer(config, status, f"limelight-put-back-{config.topic}")
    try:
        return _LetterReturn(consumer, status, config).run(progress)
    finally:
        consumer.close()


class _LetterReturn:
    """One run of the command: reads the letters, and writes their events to the topic."""

    def __init__(self, consumer: Any, status: BrokerStatus, config: StreamConfig) -> None:
        self._consumer, self._status, self._config = consumer, status, config
        self._topic, self._letters = config.topic, config.dead_letter or f"{config.topic}-dead-letters"
        self._producer = make_producer(config, BrokerStatus())
        self._counts = PutBack()
        self._failures: list[str] = []
        self._seen: set[_Event] = set()
        held = {topic: self._held(topic) for topic in (self._letters, self._topic)}
        self._partitions, self._stored = len(held[self._topic]), held[self._letters]
        committed = {topic: self._committed(topic, list(held[topic])) for topic in held}
        # An offset outside of the topic is of an older topic of the same name.
        self._begin = {
            p: offset if low <= (offset := committed[self._letters][p]) <= high else low
            for p, (low, high) in self._stored.items()
        }
        self._next = dict(self._begin)
        # Nothing was put back before the first commit, so whatever the topic holds then is from others.
        self._unsure = {
            p: high if (offset := committed[self._topic][p]) < 0 else max(low, min(offset, high))
            for p, (low, high) in held[self._topic].items()
        }
        self._end = {p: high for p, (_, high) in held[self._topic].items()}

    def run(self, progress: Callable[[int, int], None]) -> PutBack:
        """Put all letters back that were not put back before."""
        ends = {p: high for p, (_, high) in self._stored.items()}
        # Letters before the saved offsets are done; a job may have written some of them again since.
        for message in self._read(self._letters, {p: (low, self._begin[p]) for p, (low, _) in self._stored.items()}):
            events = _rejected_events(message, self._topic) or {}
            self._seen.update(events)
        found = [
            event
            for message in self._read(self._topic, {p: (at, self._end[p]) for p, at in self._unsure.items()})
            for event in _returned_events(message)
        ]
        self._seen.update(found)
        # Saved before the first message is written, so that a killed command has a place to search from.
        self._commit()
        total = sum(ends[p] - first for p, first in self._begin.items())
        written: dict[int, int] = {}
        ranges = {p: (first, ends[p]) for p, first in self._begin.items()}
        for portion in read_ranges(self._letters, ranges, self._config):
            for message in portion:
                self._write(message, written)
                self._next[message.partition()] = message.offset() + 1
            self._flush()
            # Messages that a killed command has written are of letters further on, so these are still to be found.
            if not found:
                self._unsure |= written
            self._commit()
            progress(total - sum(ends[p] - at for p, at in self._next.items()), total)
        self._next, self._unsure = ends, self._unsure | written
        self._commit()
        return self._counts

    def _write(self, message: Any, written: dict[int, int]) -> None:
        """Produce the events of a letter that were not put back yet, as one message for each target partition.

        Args:
            message: message of the dead-letter topic.
            written: offset after the last message written to each partition, updated upon delivery.
        """
        events = _rejected_events(message, self._topic)
        if events is None:
            self._counts.foreign += 1
            return
        if max(events.values()) >= self._partitions:
            raise UserError(
                f"topic {message.topic()} partition {message.partition()} offset {message.offset()}: the dead letter "
                f"is for partition {max(events.values())}, topic {self._topic} has {self._partitions}"
            )
        events = {event: target for event, target in events.items() if event not in self._seen}
        self._counts.duplicates += not events
        self._seen.update(events)

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                self._failures.append(error.str())
            else:
                written[message.partition()] = max(written.get(message.partition(), 0), message.offset() + 1)

        format = dict(message.headers()).get(f"{HEADER_PREFIX}format")
        for target in sorted(set(events.values())):
            origin = [event for event, at in events.items() if at == target]
            numbers = [number for _, _, number in origin]
            value = message.value()
            if format in (b"json", b"arrow"):
                value = select_events("json" if format == b"json" else "arrow", value, numbers)
            partition, offset, _ = origin[0]
            marker = f"{partition}:{offset}:{','.join(map(str, numbers))}".encode()
            produce(
                self._producer,
                self._topic,
                key=message.key(),
                value=value,
                partition=target,
                headers=[*own_headers(message), (PUT_BACK_HEADER, marker)],
                on_delivery=delivered,
            )
            self._counts.messages += 1

    def _flush(self) -> None:
        """Wait until all messages are written."""
        left = self._producer.flush(self._config.retry_seconds)
        if left or self._failures:
            why = self._failures[0] if self._failures else self._status.last_error or "no broker answers"
            raise UserError(f"topic {self._topic}: dead letters cannot be put back ({why}); try again")

    def _commit(self) -> None:
        """Save the progress in one request, so that its parts always belong together."""
        kafka = library()
        offsets = [kafka.TopicPartition(self._letters, p, offset) for p, offset in self._next.items()]
        offsets += [kafka.TopicPartition(self._topic, p, offset) for p, offset in self._unsure.items()]
        retry(
            lambda timeout: without_errors(self._consumer.commit(offsets=offsets, asynchronous=False)),
            self._config,
            self._status,
        )

    def _read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Any]:
        for portion in read_ranges(topic, ranges, self._config):
            yield from portion

    def _held(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return the low and high offsets of each partition."""
        config, status = self._config, self._status
        count = retry(lambda timeout: topic_partitions(self._consumer, topic, timeout), config, status)[0]
        return watermarks(self._consumer, range(count), config.model_copy(update={"topic": topic}), status)

    def _committed(self, topic: str, partitions: list[int]) -> dict[int, int]:
        """Return the committed offsets of the group, negative where there is none."""
        asked = [library().TopicPartition(topic, p) for p in partitions]
        found = retry(
            lambda timeout: without_errors(self._consumer.committed(asked, timeout=timeout)), self._config, self._status
        )
        return {at.partition: at.offset for at in found}


def _rejected_events(message: Any, topic: str) -> dict[_Event, int] | None:
    """Return the rejected events of a letter of a topic with their target partitions; None for other messages."""
    found = {name: value or b"" for name, value in message.headers() or [] if name.startswith(HEADER_PREFIX)}
    header = {name.removeprefix(HEADER_PREFIX): value.decode(errors="replace") for name, value in found.items()}
    try:
        origin = int(header["partition"]), int(header["offset"])
        inside = [int(number) for number in header["inside"].split(",")]
        # Letters of version 0.1 hold one event, and neither the format nor the target.
        targets = [int(number) for number in header["target"].split(",")] if "target" in header else [origin[0]]
        events = {(*origin, number): target for number, target in zip(inside, targets, strict=True)}
    except (KeyError, ValueError):
        return None
    return events if header.get("topic") == topic and min(targets) >= 0 else None


def _returned_events(message: Any) -> list[_Event]:
    """Return the origins of the events of a message that was put back; none of another message."""
    marker = dict(message.headers() or []).get(PUT_BACK_HEADER) or b""
    try:
        partition, offset, numbers = marker.decode().split(":")
        return [(int(partition), int(offset), int(number)) for number in numbers.split(",")]
    except ValueError:
        return []
