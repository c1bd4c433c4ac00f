"""``limelight stream publish``: a dataset on a Kafka topic.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import sys

from launch.cli.main import main
from tests.stream.event_logs import content, store
from tests.stream.random_logs import SPEC
from tests.stream.sources.kafka_reading import ALL, EVENTS, by_user, read
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.replay import ReplaySource


def test_publish_puts_a_dataset_on_a_topic(cluster, tmp_path, capsys):
    path = store(tmp_path / "log", EVENTS)
    topic = cluster.topic()
    command = ["stream", "publish", str(path), "--brokers", cluster.brokers, "--topic", topic]
    assert main([*command, "--speed", "1e6"]) == 0
    assert f"3,000 events are on topic {topic} in 4 partitions" in capsys.readouterr().out
    messages = cluster.messages(topic)
    assert [message.key() for message in messages[:1]] == [str(by_user(messages[0])).encode()]
    config = cluster.config(topic, batch_events=170)
    with ReplaySource(path, config).open(ALL) as reader:
        replayed = [content(batch) for batch in reader]
    assert [content(batch) for batch in read(config)] == replayed, "both sources give the same batches"
    assert main(command) == 2
    assert f"topic {topic} has 3,000 messages already" in capsys.readouterr().err
    assert main([*command, "--append", "--format", "json", "--events-per-message", "500"]) == 0
    assert sum(map(len, read(config))) == 6000


def test_publish_creates_the_topic_or_says_what_to_do(cluster, tmp_path, capsys):
    path = store(tmp_path / "log", EVENTS)
    topic = f"{cluster.topic()}-new"
    command = ["stream", "publish", str(path), "--brokers", cluster.brokers, "--topic", topic, "--partitions", "3"]
    status = main([*command, "--retry-seconds", "30" if cluster.real else "1"])
    if cluster.real:
        assert status == 0
        assert KafkaSource(cluster.config(topic), SPEC).connect().partitions == 3
    else:
        # The mock cluster has no controller to create topics.
        assert status == 2
        assert f"topic {topic} does not exist and cannot be created" in capsys.readouterr().err


def test_publish_without_confluent_kafka(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    path = store(tmp_path / "log", EVENTS)
    assert main(["stream", "publish", str(path), "--brokers", "x", "--topic", "t"]) == 2
    assert "Kafka needs the package confluent-kafka" in capsys.readouterr().err
