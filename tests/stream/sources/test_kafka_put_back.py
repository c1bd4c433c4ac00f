"""Tests of dead letters: they are the whole messages, and come back to their topic once.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from launch.cli.main import main
from tests.stream.conftest import PARTITIONS, Cluster
from tests.stream.event_logs import START_MS, by_partition, random_events
from tests.stream.random_logs import SPEC
from trainer.config.stream import StreamConfig
from trainer.stream.sources import kafka_client, kafka_put_back
from trainer.stream.sources.kafka_put_back import PutBack, put_back
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.message_codec import MessageCodec

EVENTS = by_partition(random_events(seed=9, events=60), PARTITIONS)
FUTURE_MS = 32_503_680_000_000
"""Begin of the year 3000."""

HEADERS: list[tuple[str, bytes | None]] = [("trace", b"\x00\xff"), ("trace", None)]


def send(cluster: Cluster, topic: str, partition: int, value: bytes | None, key: bytes | None) -> None:
    """Send one message with headers."""
    cluster.producer.produce(topic, value=value, key=key, partition=partition, headers=HEADERS)
    assert cluster.producer.flush(120) == 0


def train_on(config: StreamConfig) -> tuple[list[int], int]:
    """Read a topic to its end; return the visits of its events, and the number of rejected ones."""
    visits: list[int] = []
    position: dict[int, list[int]] = {}
    with KafkaSource(config, SPEC).connect().open(range(PARTITIONS)) as reader:
        for batch in reader:
            visits += batch.events["visit_id"].tolist()
            position |= batch.position
    return sorted(visits), sum(at[3] for at in position.values())


def lines(partition: int, visits: Sequence[int], **changes: Any) -> list[bytes]:
    """Return events of a user of a partition, with these visit ids."""
    own = {name: column[:1] for name, column in EVENTS[partition].items()}
    event = json.loads(MessageCodec("json", SPEC, 0).encode(own)[0])
    return [json.dumps(event | {"event": "like", "visit_id": visit} | changes).encode() for visit in visits]


def test_whole_messages_are_kept_and_come_back_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_client, "READ_MESSAGES", 3)
    config = cluster.config(cluster.topic())
    late = {"time_ms": FUTURE_MS}
    good, future = lines(1, (1, 2)), lines(1, (3, 4), **late)
    pretty = json.dumps(json.loads(future[0]) | {"visit_id": 5}, indent=2).encode()
    sent: list[tuple[int, bytes | None, bytes | None]] = [
        (1, good[0], b"key"),
        (1, b"\n".join([good[1], future[0], future[1]]), None),
        (1, pretty, b""),
        (2, lines(1, [6])[0], b"moved"),
        (0, None, b"tombstone"),
        (0, b"", b"k"),
        (3, b"\x00\x01\xff", None),
    ]
    for partition, value, key in sent:
        send(cluster, config.topic, partition, value, key)
    assert train_on(config) == ([1, 2], 7)
    letters = cluster.messages(f"{config.topic}-dead-letters")
    found = {(letter.key(), letter.value()) for letter in letters}
    assert found == {(key, value) for _, value, key in sent[1:]}
    for letter in letters:
        assert letter.headers()[:2] == HEADERS
        header = dict(letter.headers()[2:])
        assert header["limelight.topic"] == config.topic.encode() and header["limelight.reason"]

    # A job that was killed writes its letters twice, and others may use the topic as well.
    assert train_on(config) == ([1, 2], 7)
    cluster.send(f"{config.topic}-dead-letters", 0, [b"mine", None])
    assert put_back(config) == PutBack(messages=6, duplicates=6, foreign=2)
    assert put_back(config) == PutBack()
    messages = [message for message in cluster.messages(config.topic) if message.offset() >= 0]
    assert len(messages) == len(sent) + 6
    again = {(message.key(), message.value(), message.partition()) for message in messages} - {
        (key, value, partition) for partition, value, key in sent
    }
    # Only the rejected events of a message with others come back, and an event of another partition goes there.
    assert again == {(None, b"\n".join(future), 1), (b"moved", lines(1, [6])[0], 1)}
    assert all(message.headers()[:2] == HEADERS for message in messages)
    assert sorted(message.headers()[2:] for message in messages)[-6:] == [
        [("limelight.put_back", origin)] for origin in (b"0:0:0", b"0:1:0", b"1:1:1,2", b"1:2:0", b"2:0:0", b"3:0:0")
    ]

    # With the setting corrected, everything that is an event is trained on: what was good, and what has come back.
    corrected = config.model_copy(update={"future_hours": 1e7, "dead_letter": f"{config.topic}-others"})
    if not cluster.real:
        visits, rejected = train_on(corrected)
        assert visits == sorted([1, 2, 3, 4, 5, 6, 3, 4, 5])
        assert rejected == 7


@pytest.mark.parametrize("format", ["json", "arrow"])
def test_messages_of_several_events_come_back_without_those_that_were_trained_on(cluster: Cluster, format: Any) -> None:
    config = cluster.config(cluster.topic(), format=format)
    own = {name: column[:6].copy() for name, column in EVENTS[2].items()}
    own["time_ms"][[1, 4]] = FUTURE_MS
    send(cluster, config.topic, 2, MessageCodec(format, SPEC, 0).encode_together(own), None)
    good, rejected = train_on(config)
    assert len(good) == 4 and rejected == 2
    (letter,) = cluster.messages(f"{config.topic}-dead-letters")
    header = dict(letter.headers())
    assert header["limelight.inside"] == b"1,4" and header["limelight.format"] == format.encode()
    assert header["limelight.reason"].startswith(b"event 1: time_ms is more than 24 h ahead of the clock; event 4: ")
    assert put_back(config).messages == 1
    (_, message) = cluster.messages(config.topic)
    decoded = MessageCodec(format, SPEC, FUTURE_MS).decode([message.value()], START_MS)
    assert decoded.events["visit_id"].tolist() == own["visit_id"][[1, 4]].tolist()


def test_dead_letters_of_version_0_1_come_back(cluster: Cluster) -> None:
    topic, (line,) = cluster.topic(), lines(3, [8])
    headers = {"reason": "r", "topic": topic, "partition": 3, "offset": 5, "inside": 2}
    cluster.producer.produce(
        f"{topic}-dead-letters",
        value=line,
        partition=0,
        headers=[(f"limelight.{name}", str(value).encode()) for name, value in headers.items()],
    )
    assert cluster.producer.flush(120) == 0
    assert put_back(cluster.config(topic)) == PutBack(messages=1)
    (message,) = cluster.messages(topic)
    assert (message.partition(), message.value()) == (3, line)
    assert message.headers() == [("limelight.put_back", b"3:5:2")]


class Killed(Exception):
    """Death of the command."""


def dead_letters(cluster: Cluster, messages: int) -> tuple[StreamConfig, list[tuple[int, bytes]]]:
    """Return the config of a topic with rejected events in all partitions, and these events with their partition."""
    config = cluster.config(cluster.topic())
    sent = [(p, lines(p, [visit], time_ms=FUTURE_MS)[0]) for visit in range(messages) for p in range(PARTITIONS)]
    for p, value in sent:
        cluster.producer.produce(config.topic, value=value, partition=p)
    assert cluster.producer.flush(120) == 0
    assert train_on(config) == ([], len(sent))
    return config, sorted(sent)


def returned(cluster: Cluster, topic: str) -> list[tuple[int, bytes]]:
    """Return the messages that were put back on a topic, with their partition."""
    return sorted((message.partition(), message.value()) for message in cluster.messages(topic) if message.headers())


@pytest.mark.parametrize("step", ["produce", "flush", "commit"])
def test_a_killed_command_is_repeated_and_puts_every_event_back_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(kafka_client, "READ_MESSAGES", 3)
    config, sent = dead_letters(cluster, 4)
    allowed = 0
    target: Any = kafka_put_back if step == "produce" else kafka_put_back._LetterReturn
    name = "produce" if step == "produce" else f"_{step}"
    real = getattr(target, name)

    def deadly(first: Any, *arguments: Any, **options: Any) -> None:
        nonlocal allowed
        if allowed == 0:
            producer = first if step == "produce" else first._producer
            # Messages that are still in the queue of the producer die with it.
            if len(deaths) % 2:
                producer.purge(in_flight=False)
            assert producer.flush(120) == 0
            raise Killed
        allowed -= 1
        real(first, *arguments, **options)

    monkeypatch.setattr(target, name, deadly)
    deaths: list[int] = []
    for allowance in (0, 1, 2, 0, 1000):
        allowed = allowance
        try:
            put_back(config)
        except Killed:
            deaths.append(allowance)
    assert deaths == [0, 1, 2, 0]
    assert returned(cluster, config.topic) == sent
    monkeypatch.undo()
    assert put_back(config) == PutBack()


def test_a_letter_that_is_written_again_after_it_was_put_back_stays(cluster: Cluster) -> None:
    config, sent = dead_letters(cluster, 2)
    position = {p: [0, 0, 0, 0] for p in range(PARTITIONS)}
    assert put_back(config).messages == len(sent)
    # A job that was killed continues at its last checkpoint: it rejects the same messages again, and then the new ones.
    with KafkaSource(config, SPEC).connect().open(range(PARTITIONS), position) as reader:
        assert sum(map(len, reader)) == 0
    counts = put_back(config)
    assert (counts.messages, counts.duplicates) == (len(sent), len(sent))
    assert returned(cluster, config.topic) == sorted([*sent, *sent])


def test_nobody_elses_message_counts_as_put_back(cluster: Cluster) -> None:
    config, sent = dead_letters(cluster, 1)
    headers = [("limelight.put_back", value) for value in (b"", None, b"1:2", b"x:0:0", b"0:0:\xff")]
    cluster.producer.produce(config.topic, value=b"other", partition=0, headers=headers)
    assert cluster.producer.flush(120) == 0
    assert put_back(config).messages == len(sent)


def test_the_command_puts_dead_letters_back(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    config = cluster.config(cluster.topic())
    cluster.send(config.topic, 1, lines(1, [3], time_ms=FUTURE_MS))
    assert train_on(config) == ([], 1)
    command = ["stream", "publish", "--dead-letters", "--brokers", config.brokers, "--topic", config.topic]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"messages put back on topic {config.topic}: 1\n")
    assert main([*command, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts == {"topic": config.topic, "messages": 0, "duplicates": 0, "foreign": 0}
    for extra, message in (
        ((*command, "data/world"), "--dead-letters takes no DATASET"),
        (("stream", "publish", "--brokers", "b:1", "--topic", "t"), "name a DATASET, or --dead-letters"),
    ):
        assert main(list(extra)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_letter_for_a_partition_that_is_gone_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    topic = cluster.topic()
    headers = {"reason": "r", "topic": topic, "partition": PARTITIONS, "offset": 5, "inside": 0}
    cluster.producer.produce(
        f"{topic}-dead-letters",
        value=b"x",
        headers=[(f"limelight.{name}", str(value).encode()) for name, value in headers.items()],
    )
    assert cluster.producer.flush(120) == 0
    assert main(["stream", "publish", "--dead-letters", "--brokers", cluster.brokers, "--topic", topic]) == 2
    assert f"for partition {PARTITIONS}, topic {topic} has {PARTITIONS}" in capsys.readouterr().err
