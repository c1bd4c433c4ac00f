"""Kafka brokers and topics that are missing, come later, go away or change.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import threading

import pytest

from tests.stream.conftest import PARTITIONS
from tests.stream.random_logs import SPEC
from tests.stream.sources.kafka_reading import ALL, EVENTS, read
from trainer.console.errors import UserError
from trainer.stream.sources import kafka_source
from trainer.stream.sources.kafka_source import KafkaSource


def test_a_missing_topic_is_waited_for_and_then_an_error(cluster, capsys):
    name = cluster.topic()
    cluster.send(name, 0, [b"x"])
    # A third of the time is enough for a first answer also of a busy machine.
    config = cluster.config(f"{name}x", retry_seconds=3.0)
    with pytest.raises(UserError) as error:
        KafkaSource(config, SPEC).connect()
    reason = f"no topic '{name}x' on the Kafka brokers (did you mean '{name}'?)"
    assert str(error.value) == f"{reason}; gave up after 3 s (stream.retry_seconds)"
    assert f"stream: {reason}; trying for another " in capsys.readouterr().out
    assert cluster.producer.list_topics(timeout=120).topics.keys().isdisjoint({f"{name}x"}), (
        "a metadata request has created the topic"
    )


def test_a_topic_that_comes_is_found(cluster):
    if cluster.real:
        pytest.skip("only the mock cluster creates a topic with a metadata request")
    name = f"{cluster.topic()}-later"
    timer = threading.Timer(0.7, lambda: cluster.producer.list_topics(name, timeout=120))
    timer.start()
    assert KafkaSource(cluster.config(name), SPEC).connect().partitions == PARTITIONS
    timer.join()


def test_unreachable_brokers_are_given_up_on(capsys):
    pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    # Port 9 belongs to the discard service, which no machine runs any more.
    config = kafka_source.StreamConfig(source="kafka", brokers="127.0.0.1:9", topic="watch", retry_seconds=3.0)
    with pytest.raises(UserError, match=r"no Kafka broker answers at 127.0.0.1:9 \(.*refused.*\); gave up after 3 s"):
        KafkaSource(config, SPEC).connect()
    assert "stream: no Kafka broker answers at 127.0.0.1:9 (" in capsys.readouterr().out


def test_brokers_that_go_away_while_reading(own_cluster):
    config = own_cluster.published(EVENTS, 1, until_end=False, batch_events=1000)
    with KafkaSource(config, SPEC).connect().open(ALL) as reader:
        assert reader.take() is not None
        # Only what comes now shall not be waited for.
        reader._feed._config = config.model_copy(update={"retry_seconds": 2.0})
        own_cluster.close()
        with pytest.raises(UserError, match=r"no Kafka broker answers at .*; gave up after 2 s"):
            while True:
                reader.take(1.0)


def test_a_topic_with_other_partitions_is_refused(cluster, monkeypatch):
    config = cluster.published(EVENTS, 1, until_end=False)
    position = read(config, batches=1)[0].position
    with pytest.raises(UserError, match="has partitions 0 to 7, the source has 0 to 3"):
        read(config, ALL, {**position, **{p: [0, 0, 0, 0] for p in range(4, 8)}})
    monkeypatch.setattr(kafka_source, "_CHECK_SECONDS", 0.1)
    with KafkaSource(config, SPEC).connect().open(ALL) as reader:
        monkeypatch.setattr(kafka_source, "topic_partitions", lambda consumer, topic, timeout: (8, "cluster"))
        with pytest.raises(UserError, match="has 8 partitions now instead of 4: users have moved to other partitions"):
            while True:
                reader.take(1.0)
