"""Messages of a Kafka topic that cannot be used: dead letters, and topics that are refused before the first one.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.stream.conftest import PARTITIONS
from tests.stream.event_logs import START_MS, by_partition, content, events_of, logged_of, merged
from tests.stream.random_logs import SPEC
from tests.stream.sources.kafka_reading import ALL, EVENTS, by_user, part, read
from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.kafka_topic import TopicPublisher
from trainer.stream.sources.message_codec import MessageCodec


def test_rejected_events_are_kept_with_the_reason_and_counted_once(cluster):
    config = cluster.config(cluster.topic(), batch_events=400)
    cluster.send(config.topic, 0, [b"early"])
    topic = TopicPublisher(config, SPEC, PARTITIONS, append=True).open()
    topic.publish(EVENTS, 5, logged_of(EVENTS))
    topic.flush()
    good = MessageCodec("json", SPEC, 0).encode(part(by_partition(EVENTS)[1], 0, 1))[0]
    cluster.send(config.topic, 1, [b"nonsense", None, good + b"\n" + good.replace(b'"time_ms": 1', b'"time_ms": -1')])
    cluster.send(config.topic, 2, [good])
    batches = read(config)
    assert sum(map(len, batches)) == 3001
    end = batches[-1].position
    assert [end[p][3] for p in ALL] == [1, 3, 1, 0]
    letters = cluster.messages(f"{config.topic}-dead-letters")
    found = {tuple(value.decode() for _, value in letter.headers()): letter.value() for letter in letters}
    at, none = end[1][0], "not JSON: Expecting value: line 1 column 1 (char 0)"
    both = good + b"\n" + good.replace(b'"time_ms": 1', b'"time_ms": -1')
    assert found == {
        (none, config.topic, "0", "0", "json", "0", "0"): b"early",
        (none, config.topic, "1", str(at - 3), "json", "0", "1"): b"nonsense",
        ("the message has no value (null)", config.topic, "1", str(at - 2), "json", "0", "1"): None,
        ("time_ms is negative", config.topic, "1", str(at - 1), "json", "1", "1"): both,
        (
            "its user belongs to partition 1, not to partition 2",
            *(config.topic, "2", str(end[2][0] - 1), "json", "0", "1"),
        ): good,
    }
    assert {tuple(key for key, _ in letter.headers()) for letter in letters} == {
        tuple(f"limelight.{name}" for name in ("reason", "topic", "partition", "offset", "format", "inside", "target"))
    }
    # A reader that resumes in the middle ends with the same counts.
    batch = batches[3]
    assert batch.position[0][3] == 1
    assert read(config, ALL, batch.position)[-1].position == end


def test_events_with_invalid_features_are_kept_with_the_reason(cluster):
    config = cluster.config(cluster.topic())
    owner = int(partition_of(np.array([17]), PARTITIONS)[0])
    event = {"user_id": 17, "author_id": 1, "item_id": 1, "domain": "live", "event": "exposure", "time_ms": START_MS}
    features = {"side": [1, 2], "dense": [0.5], "stat": [0] * 8}
    sent = [event | {"visit_id": visit} | features for visit in (1, 2, 3)]
    sent[1]["stat"] = [0] * 7
    cluster.send(config.topic, owner, [json.dumps(each).encode() for each in sent])
    with KafkaSource(config, SPEC).connect().open(ALL) as reader:
        (batch,) = reader
    assert batch.events["visit_id"].tolist() == [1, 3]
    assert batch.logged.at.tolist() == [0, 1]
    assert batch.position[owner] == [3, 0, START_MS, 1]
    (letter,) = cluster.messages(f"{config.topic}-dead-letters")
    assert dict(letter.headers())["limelight.reason"] == b"stat has 7 values; it must have 8"
    assert json.loads(letter.value()) == sent[1]


def test_positions_count_what_was_rejected_before_them(cluster):
    rng = np.random.default_rng(8)
    config = cluster.config(cluster.topic(), batch_events=37)
    bad: dict[int, list[tuple[int, int]]] = {p: [] for p in ALL}
    for p, events in by_partition(part(EVENTS, 0, 450)).items():
        lines = MessageCodec("json", SPEC, 0).encode(events, logged_of(events))
        sent: list[bytes] = []
        while lines:
            message = []
            for inside in range(rng.integers(1, 6)):
                if rng.random() < 0.2 or not lines:
                    bad[p].append((len(sent), inside))
                    message.append(b"bad")
                else:
                    message.append(lines.pop(0))
            sent.append(b"\n".join(message))
        cluster.send(config.topic, p, sent)
    batches = read(config)
    assert events_of(batches) == merged(part(EVENTS, 0, 450), ALL)
    for batch in batches:
        for p, (place, inside, _, rejected) in batch.position.items():
            assert rejected == sum(at < (place, inside) for at in bad[p])
    assert {p: at[3] for p, at in batches[-1].position.items()} == {p: len(at) for p, at in bad.items()}
    for cut in range(1, len(batches), 5):
        again = read(config, ALL, batches[cut - 1].position)
        assert list(map(content, again)) == list(map(content, batches[cut:]))


def dead_letters(cluster, config) -> int:
    known = cluster.producer.list_topics(timeout=120).topics
    return len(cluster.messages(f"{config.topic}-dead-letters")) if f"{config.topic}-dead-letters" in known else 0


def test_a_topic_of_another_partitioner_is_refused_before_the_first_dead_letter(cluster):
    config = cluster.config(cluster.topic())
    owner = (EVENTS["user_id"] * 7 + 1) % PARTITIONS
    values = MessageCodec("json", SPEC, 0).encode(EVENTS, logged_of(EVENTS))
    for p in ALL:
        cluster.send(config.topic, p, [values[k] for k in np.flatnonzero(owner == p)])
    refused = (
        rf"topic {config.topic} partition \d: \d+ of the \d+ users at offsets 0 to \d+ belong to other partitions "
        r"\(such as offset \d+: its user belongs to partition \d, not to partition \d\): the topic has another "
        r'partitioner; set stream.partitioner = "producer" if its producer keeps every user in one partition$'
    )
    # A job that is started again decides the same, from any position and on any number of ranks.
    for partitions, position in ((ALL, None), (ALL, None), ([2], None), (ALL, {p: [300, 0, 0, 0] for p in ALL})):
        with pytest.raises(UserError, match=refused):
            KafkaSource(config, SPEC).connect().open(partitions, position)
    assert dead_letters(cluster, config) == 0
    # A new job that starts behind these messages has nothing to do with them.
    assert read(config.model_copy(update={"begin": "latest"})) == []


def test_messages_of_another_partitioner_that_come_later_stop_the_job_before_they_are_dead_letters(cluster):
    config = cluster.config(cluster.topic(), until_end=False, linger_seconds=0.05, idle_seconds=0.1)
    values = MessageCodec("json", SPEC, 0).encode(EVENTS, logged_of(EVENTS))
    with KafkaSource(config, SPEC).connect().open(ALL) as reader:
        cluster.send(
            config.topic, 1, [values[k] for k in np.flatnonzero(partition_of(EVENTS["user_id"], PARTITIONS) == 2)]
        )
        with pytest.raises(UserError, match=r"partition 1: \d+ of the \d+ users .* the topic has another partitioner"):
            while True:
                reader.take(1.0)
    # Until six users were seen, nothing could be decided.
    assert len({by_user(message) for message in cluster.messages(f"{config.topic}-dead-letters")}) < 6


def test_a_few_misplaced_messages_are_dead_letters(cluster):
    config = cluster.published(EVENTS, 1)
    values = MessageCodec("json", SPEC, 0).encode(EVENTS, logged_of(EVENTS))
    at = np.flatnonzero(partition_of(EVENTS["user_id"], PARTITIONS) == 2)
    misplaced = [values[k] for k in at[np.unique(EVENTS["user_id"][at], return_index=True)[1][:3]]]
    cluster.send(config.topic, 1, misplaced)
    batches = read(config)
    assert events_of(batches) == merged(EVENTS, ALL)
    assert batches[-1].position[1][3] == dead_letters(cluster, config) == 3
    # From the position in front of them, with the messages before as evidence, they are dead letters again.
    assert read(config, ALL, {p: [at[0] - 3 * (p == 1), *at[1:]] for p, at in batches[-1].position.items()})
    assert dead_letters(cluster, config) == 6


def test_a_topic_in_another_format_is_refused_before_the_first_dead_letter(cluster):
    config = cluster.published(EVENTS, 1).model_copy(update={"format": "arrow"})
    reason = (
        r"partition \d: 50 of the 50 messages at offsets 0 to 49 were rejected \(such as offset \d+: not an Arrow "
        r"stream of events: .*\); "
        "check that stream.format = 'arrow' and stream.partitioner = 'limelight' are those of the topic$"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=reason):
            read(config)
    assert dead_letters(cluster, config) == 0
