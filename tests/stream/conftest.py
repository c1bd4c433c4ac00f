"""Kafka for tests: librdkafka's mock cluster in this process, or real brokers if ``LIMELIGHT_KAFKA_BROKERS`` is set."""

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
"""Number of partitions of a topic in the mock cluster."""


class Cluster:
    """Brokers, and the topics that this test run creates on them."""

    def __init__(self, kafka: Any, brokers: str) -> None:
        self.kafka, self.real, self._mock = kafka, bool(brokers), None
        self._created: list[str] = []
        if not brokers:
            self._mock = kafka.Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 2})
            known = self._mock.list_topics(timeout=120).brokers.values()
            brokers = ",".join(f"{broker.host}:{broker.port}" for broker in known)
        self.brokers = brokers
        self.producer = kafka.Producer({"bootstrap.servers": brokers, "log_level": 2, "linger.ms": 5})

    def topic(self) -> str:
        """Create a topic of four partitions; return its name."""
        name = f"limelight-test-{uuid.uuid4().hex[:12]}"
        if self.real:
            from confluent_kafka.admin import AdminClient, NewTopic

            names = [name, f"{name}-dead-letters"]
            admin = AdminClient({"bootstrap.servers": self.brokers})
            for created in admin.create_topics([NewTopic(each, num_partitions=PARTITIONS) for each in names]).values():
                created.result(30)
            self._created += names
        else:
            assert len(self.producer.list_topics(name, timeout=120).topics[name].partitions) == PARTITIONS
        return name

    def config(self, topic: str, **options: Any) -> StreamConfig:
        """Return the config of a stream that ends with the topic, changed by ``options``."""
        defaults = {"until_end": True, "retry_seconds": 120.0}
        return StreamConfig(source="kafka", brokers=self.brokers, topic=topic, **{**defaults, **options})

    def published(self, events: Columns, per_message: int = 1, **options: Any) -> StreamConfig:
        """Create a topic with the events and their logged features; return its config."""
        config = self.config(self.topic(), **options)
        topic = TopicPublisher(config, SPEC, PARTITIONS).open()
        topic.publish(events, per_message, logged_of(events))
        topic.flush()
        return config

    def send(self, topic: str, partition: int, values: Sequence[bytes | None]) -> None:
        """Send raw messages to a partition."""
        for value in values:
            while True:
                try:
                    self.producer.produce(topic, value=value, partition=partition)
                    break
                except BufferError:
                    self.producer.poll(0.1)
        assert self.producer.flush(120) == 0

    def messages(self, topic: str) -> list[Any]:
        """Return all messages of a topic."""
        settings = {"bootstrap.servers": self.brokers, "group.id": "test", "enable.partition.eof": True, "log_level": 2}
        consumer = self.kafka.Consumer({**settings, "enable.auto.commit": False})
        partitions = sorted(consumer.list_topics(topic, timeout=120).topics[topic].partitions)
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
        """Stop the mock cluster, or delete the topics that were created on real brokers."""
        if self._created:
            from confluent_kafka.admin import AdminClient

            for deleted in AdminClient({"bootstrap.servers": self.brokers}).delete_topics(self._created).values():
                deleted.result(30)
        self.producer = self._mock = None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    kafka = pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    cluster = Cluster(kafka, os.environ.get(BROKERS_VARIABLE, ""))
    yield cluster
    cluster.close()


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A mock cluster that a test may stop."""
    kafka = pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    cluster = Cluster(kafka, "")
    yield cluster
    cluster.close()


@pytest.fixture
def properties(tmp_path: Path) -> Any:
    """Function that writes lines to a properties file: ``properties("key=value", ...) -> path``."""

    def write(*lines: str) -> str:
        path = tmp_path / "client.properties"
        path.write_text("\n".join(lines))
        return str(path)

    return write
