"""Offsets of a Kafka topic: messages that the broker has dropped, repeated messages, and marks of transactions.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import os
import threading

import pytest

from tests.stream.conftest import PARTITIONS, Cluster
from tests.stream.event_logs import START_MS, as_tuples, by_partition, events_of, logged_of, random_events
from tests.stream.random_logs import SPEC
from tests.stream.sources.kafka_reading import ALL, EVENTS, part, read, until
from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of
from trainer.stream.sources import kafka_source
from trainer.stream.sources.kafka_client import BrokerStatus, library
from trainer.stream.sources.kafka_source import KafkaSource, without_gaps
from trainer.stream.sources.message_codec import MessageCodec


def drop_oldest(cluster: Cluster, topic: str, partition: int) -> None:
    """Make the broker delete the older messages of a partition."""
    if cluster.real:
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": cluster.brokers})
        low, high = OffsetReader(cluster).held(topic, partition)
        for future in admin.delete_records(
            [cluster.kafka.TopicPartition(topic, partition, (low + high) // 2)]
        ).values():
            future.result(30)
    else:
        # The mock cluster keeps 5 MB of a partition.
        cluster.send(topic, partition, [os.urandom(100_000) for _ in range(60)])


class OffsetReader:
    """Reads the low and high offsets of a partition from the broker."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def held(self, topic: str, partition: int) -> tuple[int, int]:
        consumer = self._cluster.kafka.Consumer({"bootstrap.servers": self._cluster.brokers, "group.id": "test"})
        try:
            return consumer.get_watermark_offsets(self._cluster.kafka.TopicPartition(topic, partition), timeout=120)
        finally:
            consumer.close()


def test_messages_that_the_broker_has_dropped_are_a_gap(cluster, capsys):
    config = cluster.published(EVENTS, 1, batch_events=500)
    first = read(config, batches=1)[0]
    drop_oldest(cluster, config.topic, 2)
    low, _ = OffsetReader(cluster).held(config.topic, 2)
    place = first.position[2][0]
    assert low > place
    gap = f"topic {config.topic} no longer holds {low - place:,} messages that were not read: partition 2 is at offset "
    with pytest.raises(UserError) as error:
        read(config, ALL, first.position)
    assert str(error.value) == (
        f'{gap}{place:,} and starts at {low:,}; stream.on_gap = "earliest" continues without them'
    )
    accepted = config.model_copy(update={"on_gap": "earliest"})
    rest = read(accepted, ALL, first.position)
    assert f"stream: {gap}{place:,} and starts at {low:,}; continuing without them" in capsys.readouterr().out
    others = [p for p in ALL if p != 2]
    kept = [
        [e for batch in [first, *rest] for q, own in batch.by_partition() if q == p for e in as_tuples(own.events)]
        for p in others
    ]
    assert kept == [as_tuples(by_partition(EVENTS)[p]) for p in others]


def test_a_gap_is_found_while_reading(cluster, properties):
    small = properties("queued.max.messages.kbytes=16", "fetch.message.max.bytes=4096", "message.max.bytes=200000")
    if cluster.real:
        pytest.skip("a real broker keeps its segments for minutes")
    events = random_events(seed=2, events=4000, users=1)
    owner = int(partition_of(events["user_id"][:1], PARTITIONS)[0])
    config = cluster.published(events, 1, batch_events=100, queue_batches=1, properties=small, until_end=False)
    for on_gap in ("error", "earliest"):
        reader = KafkaSource(config.model_copy(update={"on_gap": on_gap}), SPEC).connect().open([owner])
        with reader:
            assert reader.take() is not None
            drop_oldest(cluster, config.topic, owner)
            if on_gap == "error":
                with pytest.raises(UserError, match=r"no longer holds .* messages that were not read"):
                    for _ in reader:
                        pass
                # The topic now holds only invalid messages, so the other half of this test needs another topic.
                config = cluster.published(
                    events, 1, batch_events=100, queue_batches=1, properties=small, until_end=False
                )
            else:
                low, _ = OffsetReader(cluster).held(config.topic, owner)
                assert low > 0
                until(lambda reader=reader, low=low: reader.take(1.0) is not None and reader.position[owner][0] >= low)


def test_gaps_without_brokers():
    config = kafka_source.StreamConfig(source="kafka", brokers="b", topic="t")
    accepting = config.model_copy(update={"on_gap": "earliest"})
    position = {0: [10, 3, 50, 1], 1: [20, 0, 60, 0], 2: [5, 0, 1, 0]}
    held = {0: (10, 90), 1: (20, 20), 2: (0, 5)}
    assert without_gaps(position, held, config) == position
    with pytest.raises(
        UserError, match=r"no longer holds 7 messages .*: partition 0 is at offset 10 and starts at 15; "
    ):
        without_gaps(position, {**held, 0: (15, 90), 1: (22, 30)}, config)
    assert without_gaps(position, {**held, 0: (15, 90)}, accepting) == {**position, 0: [15, 0, 50, 1]}
    for either in (config, accepting):
        with pytest.raises(UserError, match="saved position is offset 20, the topic ends at 19: it is not the topic"):
            without_gaps(position, {**held, 1: (0, 19)}, either)


@pytest.mark.parametrize("gone", [1, 7, 8, 9, 20])
def test_eight_gaps_are_named_and_all_others_counted(gone: int):
    config = kafka_source.StreamConfig(source="kafka", brokers="b", topic="t")
    with pytest.raises(UserError) as refused:
        without_gaps({p: [p, 0, 0, 0] for p in range(gone)}, {p: (p + 10, 99) for p in range(gone)}, config)
    named = [f"partition {p} is at offset {p} and starts at {p + 10}" for p in range(min(gone, 8))]
    more = f"; and {gone - 8} more" if gone > 8 else ""
    assert f"no longer holds {10 * gone} messages that were not read: {'; '.join(named)}{more}; stream" in str(
        refused.value
    )


class Delivered:
    """Message with the interface of the library."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def error(self) -> None:
        return None

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return 1, START_MS

    def value(self) -> bytes:
        event = part(EVENTS, self._offset, self._offset + 1)
        return MessageCodec("json", SPEC, 0).encode(event, logged_of(event))[0]


class Repeating:
    """Consumer whose library delivers some messages twice, and some after the end."""

    def __init__(self) -> None:
        self._portions = [[0, 1, 2], [1, 2, 3], [3], [4, 5, 6, 7]]

    def consume(self, messages: int, timeout: float) -> list[Delivered]:
        return [Delivered(offset) for offset in self._portions.pop(0)]

    def incremental_assign(self, partitions: list) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_message_that_is_delivered_twice_counts_once():
    pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    config = kafka_source.StreamConfig(
        source="kafka", brokers="b", topic="t", until_end=True, partitioner="producer", batch_events=100
    )
    feed = kafka_source._KafkaFeed(Repeating(), BrokerStatus(), {0: [0, 0, 0, 0]}, {0: (0, 6)}, 1, config, SPEC, 0)
    assert events_of(feed.batches(threading.Event())) == as_tuples(part(EVENTS, 0, 6))


class EndOfPartition:
    """Message of librdkafka at the end of a partition; its offset is the one after the last record."""

    def __init__(self, partition: int, offset: int | None) -> None:
        self._place = partition, offset

    def error(self) -> object:
        return library().KafkaError(library().KafkaError._PARTITION_EOF)

    def partition(self) -> int:
        return self._place[0]

    def offset(self) -> int | None:
        return self._place[1]


@pytest.mark.parametrize(
    ("offset", "until_end", "ends"),
    [(10, True, True), (12, True, True), (9, True, False), (None, True, False), (12, False, False)],
)
def test_marks_of_transactions_at_the_end_of_a_partition_are_passed(offset, until_end, ends):
    """The topic ends at offset 10; messages were delivered up to offset 6, and marks of transactions follow."""
    config = StreamConfig(source="kafka", brokers="b:9", topic="t", until_end=until_end)
    waiting = EndOfPartition(0, offset)

    class Consumer:
        def __init__(self) -> None:
            self.polls = 0

        def incremental_assign(self, partitions: object) -> None:
            pass

        def consume(self, wanted: int, seconds: float) -> list[EndOfPartition]:
            self.polls += 1
            if self.polls > 3:
                stop.set()
            return [waiting] if self.polls == 1 else []

        def get_watermark_offsets(self, partition: object, cached: bool) -> None:
            return None

        def close(self) -> None:
            pass

    stop, consumer = threading.Event(), Consumer()
    feed = kafka_source._KafkaFeed(
        consumer, BrokerStatus(), {0: [7, 0, 5, 2]}, {0: (0, 10)}, 1, config, SPEC, slice_ms=0
    )
    batches = list(feed.batches(stop))
    assert stop.is_set() != ends, "the topic has been read to its end"
    # The place after the marks is stored, so a resumed run does not wait for them.
    assert [batch.position for batch in batches] == ([{0: [offset, 0, 5, 2]}] if ends else [])
