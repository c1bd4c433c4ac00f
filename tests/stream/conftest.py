"""Kafka for tests: librdkafka's own cluster in this process, or real brokers where they are named."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.stream.event_logs import logged_of
from tests.stream.random_logs import SPEC
from trainer.config.stream import StreamConfig
from trainer.data.format.validation import Columns
from trainer.stream.sources.kafka_topic import TopicPublisher

BROKERS_VARIABLE = "LIMELIGHT_KAFKA_BROKERS"
PARTITIONS = 4
"""Of topics that librdkafka's cluster makes."""


class Cluster:
    """Brokers, and topics of this test run on them."""

    def __init__(self, kafka: Any, brokers: str) -> None:
        self.kafka, self.real, self._mock = kafka, bool(brokers), None
        self._made: list[str] = []
        if not brokers:
            self._mock = kafka.Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 2})
            known = self._mock.list_topics(timeout=20).brokers.values()
            brokers = ",".join(f"{broker.host}:{broker.port}" for broker in known)
        self.brokers = brokers
        self.producer = kafka.Producer({"bootstrap.servers": brokers, "log_level": 2, "linger.ms": 5})

    def topic(self) -> str:
        """A new topic of four partitions."""
        name = f"limelight-test-{uuid.uuid4().hex[:12]}"
        if self.real:
            from confluent_kafka.admin import AdminClient, NewTopic

            names = [name, f"{name}-dead-letters"]
            admin = AdminClient({"bootstrap.servers": self.brokers})
            for made in admin.create_topics([NewTopic(each, num_partitions=PARTITIONS) for each in names]).values():
                made.result(30)
            self._made += names
        else:
            assert len(self.producer.list_topics(name, timeout=20).topics[name].partitions) == PARTITIONS
        return name

    def config(self, topic: str, **options: Any) -> StreamConfig:
        """Of a stream that ends with the topic, unless the options say otherwise."""
        defaults = {"until_end": True, "retry_seconds": 20.0}
        return StreamConfig(source="kafka", brokers=self.brokers, topic=topic, **{**defaults, **options})

    def published(self, events: Columns, per_message: int = 1, **options: Any) -> StreamConfig:
        """A new topic that holds the events, and what is logged with them."""
        config = self.config(self.topic(), **options)
        topic = TopicPublisher(config, SPEC, PARTITIONS).open()
        topic.publish(events, per_message, logged_of(events))
        topic.flush()
        return config

    def send(self, topic: str, partition: int, values: Sequence[bytes | None]) -> None:
        """Messages as they are."""
        for value in values:
            while True:
                try:
                    self.producer.produce(topic, value=value, partition=partition)
                    break
                except BufferError:
                    self.producer.poll(0.1)
        assert self.producer.flush(30) == 0

    def messages(self, topic: str) -> list[Any]:
        """All that a topic holds."""
        settings = {"bootstrap.servers": self.brokers, "group.id": "test", "enable.partition.eof": True, "log_level": 2}
        consumer = self.kafka.Consumer({**settings, "enable.auto.commit": False})
        partitions = sorted(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
        consumer.assign([self.kafka.TopicPartition(topic, p, self.kafka.OFFSET_BEGINNING) for p in partitions])
        found, ended = [], 0
        while ended < len(partitions):
            for message in consumer.consume(1000, 0.5):
                if message.error() is None:
                    found.append(message)
                else:
                    assert message.error().code() == self.kafka.KafkaError._PARTITION_EOF, message.error()
                    ended += 1
        consumer.close()
        return found

    def close(self) -> None:
        """Brokers of our own are gone afterwards, and on others what was made here."""
        if self._made:
            from confluent_kafka.admin import AdminClient

            for gone in AdminClient({"bootstrap.servers": self.brokers}).delete_topics(self._made).values():
                gone.result(30)
        self.producer = self._mock = None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    kafka = pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    cluster = Cluster(kafka, os.environ.get(BROKERS_VARIABLE, ""))
    yield cluster
    cluster.close()


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Brokers that a test may end."""
    kafka = pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    cluster = Cluster(kafka, "")
    yield cluster
    cluster.close()


@pytest.fixture
def properties(tmp_path: Path) -> Any:
    """``properties("key=value", ...) -> path``."""

    def write(*lines: str) -> str:
        path = tmp_path / "client.properties"
        path.write_text("\n".join(lines))
        return str(path)

    return write
