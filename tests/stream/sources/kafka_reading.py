"""Events, and reading them from a Kafka topic, in tests."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.stream.conftest import PARTITIONS
from tests.stream.event_logs import START_MS, assert_logged, random_events
from tests.stream.random_logs import SPEC
from trainer.data.format.validation import Columns
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.message_codec import MessageCodec
from trainer.stream.sources.source import EventBatch, Position

EVENTS = random_events(seed=7, events=3000)
ALL = range(PARTITIONS)


def read(config, partitions=ALL, position: Position | None = None, batches: int | None = None) -> list[EventBatch]:
    taken = []
    with KafkaSource(config, SPEC).connect().open(partitions, position) as reader:
        while (batches is None or len(taken) < batches) and (batch := reader.take()) is not None:
            assert_logged(batch.events, batch.logged)
            taken.append(batch)
    return taken


def part(events: Columns, first: int, last: int) -> Columns:
    return {name: column[first:last] for name, column in events.items()}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def by_user(message) -> int:
    decoded = MessageCodec("json", SPEC, 0).decode([message.value()], START_MS * 2)
    return int(decoded.events["user_id"][0])
