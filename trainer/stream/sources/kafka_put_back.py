"""Puts dead letters back on the topic that they came from; see ``trainer.stream.sources.kafka_dead_letters``.

Only the rejected events of a message are put back, because the others are trained on. The key and the producer's
headers stay. The offset after the last dead letter is committed in the consumer group ``limelight-put-back-TOPIC``
after every portion, so that a repeated command puts nothing back twice. An event may come twice only if the command is
killed in the middle of a portion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
    retry,
    topic_partitions,
    watermarks,
)
from trainer.stream.sources.kafka_dead_letters import HEADER_PREFIX, own_headers
from trainer.stream.sources.message_codec import select_events

_PORTION = 1000
_WAIT_SECONDS = 0.5


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
    kafka, status = library(), BrokerStatus()
    letters = config.dead_letter or f"{config.topic}-dead-letters"
    consumer = make_consumer(config, status, f"limelight-put-back-{config.topic}")
    try:
        partitions = retry(lambda timeout: topic_partitions(consumer, config.topic, timeout), config, status)[0]
        count = retry(lambda timeout: topic_partitions(consumer, letters, timeout), config, status)[0]
        held = watermarks(consumer, range(count), config.model_copy(update={"topic": letters}), status)
        asked = [kafka.TopicPartition(letters, p) for p in held]
        committed = retry(lambda timeout: consumer.committed(asked, timeout=timeout), config, status)
        # A negative offset means that none is committed; one outside of the topic is of an older topic.
        begin = {
            at.partition: at.offset if held[at.partition][0] <= at.offset <= held[at.partition][1] else -1
            for at in committed
        }
        begin = {p: held[p][0] if offset < 0 else offset for p, offset in begin.items()}
        status.poll = None
        consumer.assign([kafka.TopicPartition(letters, p, offset) for p, offset in begin.items()])
        return _put_back(consumer, status, config, letters, partitions, begin, held, progress)
    finally:
        consumer.close()


def _put_back(
    consumer: Any,
    status: BrokerStatus,
    config: StreamConfig,
    letters: str,
    partitions: int,
    begin: dict[int, int],
    held: dict[int, tuple[int, int]],
    progress: Callable[[int, int], None],
) -> PutBack:
    """Write the letters from ``begin`` to the end of ``held`` back, portion by portion."""
    kafka, counts = library(), PutBack()
    producer = make_producer(config, status)
    seen: set[tuple[int, int, int]] = set()
    place = dict(begin)
    total = sum(held[p][1] - offset for p, offset in begin.items())
    heard = time.monotonic()
    while any(place[p] < held[p][1] for p in place):
        messages = consumer.consume(_PORTION, _WAIT_SECONDS)
        failures: list[str] = []
        for message in messages:
            heard, p = time.monotonic(), message.partition()
            if message.error() is not None:
                if message.error().code() != kafka.KafkaError._PARTITION_EOF:
                    raise UserError(f"topic {letters} partition {p}: cannot be read ({message.error().str()})")
                # Transaction markers have offsets too, but are never delivered.
                place[p] = max(place[p], held[p][1])
            elif message.offset() < held[p][1]:
                _write(producer, message, config.topic, partitions, seen, counts, failures)
                place[p] = message.offset() + 1
        if not messages and time.monotonic() - heard > config.retry_seconds:
            raise UserError(f"topic {letters}: no message for {config.retry_seconds:g} s ({status.last_error})")
        left = producer.flush(config.retry_seconds)
        if left or failures:
            why = failures[0] if failures else status.last_error or "no broker answers"
            raise UserError(f"topic {config.topic}: dead letters cannot be put back ({why}); try again")
        if messages:
            consumer.commit(
                offsets=[kafka.TopicPartition(letters, p, offset) for p, offset in place.items()], asynchronous=False
            )
        progress(sum(place.values()) - sum(begin.values()), total)
    return counts


def _write(
    producer: Any,
    message: Any,
    topic: str,
    partitions: int,
    seen: set[tuple[int, int, int]],
    counts: PutBack,
    failures: list[str],
) -> None:
    """Produce the rejected events of a dead letter that were not ``seen``, as one message for each target partition."""
    found = {name: value or b"" for name, value in message.headers() or [] if name.startswith(HEADER_PREFIX)}
    header = {name.removeprefix(HEADER_PREFIX): value.decode(errors="replace") for name, value in found.items()}
    try:
        origin = int(header["partition"]), int(header["offset"])
        inside = [int(number) for number in header["inside"].split(",")]
        # Letters of version 0.1 hold one event, and neither of these two headers.
        targets = [int(number) for number in header["target"].split(",")] if "target" in header else [origin[0]]
        events = dict(zip(inside, targets, strict=True))
    except (KeyError, ValueError):
        counts.foreign += 1
        return
    if header.get("topic") != topic or min(targets) < 0:
        counts.foreign += 1
        return
    if max(targets) >= partitions:
        raise UserError(
            f"topic {message.topic()} partition {message.partition()} offset {message.offset()}: the dead letter is "
            f"for partition {max(targets)}, topic {topic} has {partitions}"
        )
    events = {number: target for number, target in events.items() if (*origin, number) not in seen}
    counts.duplicates += not events
    seen.update((*origin, number) for number in events)

    def delivered(error: Any, message: Any) -> None:
        if error is not None:
            failures.append(error.str())

    for target in sorted(set(events.values())):
        numbers = {number for number, at in events.items() if at == target}
        value = message.value()
        if header.get("format") in ("json", "arrow"):
            value = select_events("json" if header["format"] == "json" else "arrow", value, numbers)
        produce(
            producer,
            topic,
            key=message.key(),
            value=value,
            partition=target,
            headers=own_headers(message),
            on_delivery=delivered,
        )
        counts.messages += 1
