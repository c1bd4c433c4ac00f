"""Tests of Kafka topics over the real protocol: every event once, from any position, and the failures.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from launch.cli.main import main
from tests.stream.conftest import PARTITIONS, Cluster
from tests.stream.event_logs import (
    START_MS,
    as_tuples,
    assert_logged,
    by_partition,
    content,
    events_of,
    logged_of,
    merge_positions,
    merged,
    random_events,
    store,
)
from tests.stream.random_logs import SPEC
from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of
from trainer.data.format.validation import Columns
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.stream.sources import kafka_source
from trainer.stream.sources.kafka_client import BrokerStatus, library
from trainer.stream.sources.kafka_source import KafkaSource, without_gaps
from trainer.stream.sources.kafka_topic import TopicPublisher
from trainer.stream.sources.message_codec import MessageCodec
from trainer.stream.sources.open_source import open_source
from trainer.stream.sources.replay import ReplaySource
from trainer.stream.sources.source import EventBatch, Position, check_identity

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


@pytest.fixture(scope="module", params=[("json", 1), ("json", 7), ("arrow", 50)], ids=str)
def topic(cluster: Cluster, request: pytest.FixtureRequest):
    format, per_message = request.param
    return cluster.published(EVENTS, per_message, format=format, batch_events=170)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_event_once_in_one_order_of_each_rank(topic, world):
    for rank in range(world):
        owned = partitions_of_rank(PARTITIONS, rank, world)
        batches = read(topic, owned)
        assert events_of(batches) == merged(EVENTS, owned)
        assert {len(batch) for batch in batches[:-1]} <= {170}


def test_it_resumes_from_any_position_as_if_it_had_never_stopped(topic):
    whole = [content(batch) for batch in read(topic)]
    assert len(whole) == 18
    inside = 0
    for cut in range(1, len(whole), 3):
        position = whole[cut - 1][2]
        inside += sum(at[1] > 0 for at in position.values())
        assert [content(batch) for batch in read(topic, ALL, position)] == whole[cut:]
    several = topic.format == "arrow" or len(whole[0][0]) != sum(at[0] for at in whole[0][2].values())
    assert bool(inside) == several, "positions inside of messages are among those tried"


def test_another_number_of_ranks_reads_the_rest(topic):
    seen: dict[int, list] = {p: [] for p in ALL}
    position = None
    for world, batches in ((2, 3), (1, 4), (4, 1), (3, None)):
        at = []
        for rank in range(world):
            owned = partitions_of_rank(PARTITIONS, rank, world)
            taken = read(replace_batch(topic, 90), owned, position, batches)
            for batch in taken:
                for p, own in batch.by_partition():
                    assert_logged(own.events, own.logged)
                    seen[p] += as_tuples(own.events)
            at.append(taken[-1].position)
        position = merge_positions(at)
    assert seen == {p: as_tuples(own) for p, own in by_partition(EVENTS).items()}


def test_slices_of_time_end_batches(topic):
    with KafkaSource(replace_batch(topic, 9999), SPEC).connect().open(ALL, None, slice_ms=700) as reader:
        batches = list(reader)
    assert events_of(batches) == merged(EVENTS, ALL)
    slices = [set((batch.events["time_ms"] // 700).tolist()) for batch in batches]
    assert all(len(inside) == 1 for inside in slices)
    assert len(slices) == len(set.union(*slices)), "a slice that fits is one batch"


def test_a_poll_takes_few_messages(cluster, monkeypatch):
    monkeypatch.setattr(kafka_source, "_MAX_MESSAGES", 3)
    some = part(EVENTS, 0, 100)
    assert events_of(read(cluster.published(some, 1, batch_events=40))) == merged(some, ALL)


def replace_batch(config, batch_events: int):
    return config.model_copy(update={"batch_events": batch_events})


def test_nothing_is_stored_at_the_broker(cluster, topic):
    read(topic)
    settings = {"bootstrap.servers": cluster.brokers, "group.id": "limelight", "log_level": 2}
    consumer = cluster.kafka.Consumer(settings)
    try:
        committed = consumer.committed([cluster.kafka.TopicPartition(topic.topic, p) for p in ALL], timeout=120)
        assert {entry.offset for entry in committed} == {cluster.kafka.OFFSET_INVALID}
    finally:
        consumer.close()


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


def test_the_producers_partitioner_is_trusted_if_configured(cluster):
    config = cluster.config(cluster.topic(), partitioner="producer")
    values = MessageCodec("json", SPEC, 0).encode(EVENTS, logged_of(EVENTS))
    owner = (EVENTS["user_id"] * 7 + 1) % PARTITIONS
    for p in ALL:
        cluster.send(config.topic, p, [values[k] for k in np.flatnonzero(owner == p)])
    batches = read(config)
    assert sorted(events_of(batches)) == sorted(as_tuples(EVENTS))
    for batch in batches:
        assert (batch.partition == (batch.events["user_id"] * 7 + 1) % PARTITIONS).all()


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
def test_every_event_of_a_compressed_topic_with_headers_and_keys(cluster, compression):
    config = cluster.config(cluster.topic())
    producer = cluster.kafka.Producer(
        {"bootstrap.servers": cluster.brokers, "compression.type": compression, "linger.ms": 50, "log_level": 2}
    )
    values = MessageCodec("json", SPEC, 0).encode(EVENTS, logged_of(EVENTS))
    owner = partition_of(EVENTS["user_id"], PARTITIONS)
    headers = [("trace", b"\x00\xff"), ("content-type", b"application/json"), ("empty", None)]
    for user, p, value in zip(EVENTS["user_id"].tolist(), owner.tolist(), values, strict=True):
        producer.produce(config.topic, key=str(user).encode(), value=value, partition=p, headers=headers)
    assert producer.flush(120) == 0
    batches = read(config)
    assert events_of(batches) == merged(EVENTS, ALL)
    assert sum(at[3] for at in batches[-1].position.values()) == 0


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


def test_a_live_topic_waits_neither_for_full_batches_nor_for_silent_partitions(cluster):
    config = cluster.config(cluster.topic(), until_end=False, linger_seconds=0.05, idle_seconds=0.1)
    topic = TopicPublisher(config, SPEC, PARTITIONS).open()
    one = by_partition(EVENTS)[3]
    source = KafkaSource(config, SPEC).connect()
    with source.open(ALL) as reader:
        assert reader.take(0.3) is None
        for first in (0, 5):
            topic.publish(part(one, first, first + 5), 1, logged_of(part(one, first, first + 5)))
            topic.flush()
            got: list = []
            while len(got) < 5:
                batch = reader.take(600)
                assert batch is not None
                got += as_tuples(batch.events)
            assert got == as_tuples(part(one, first, first + 5))
        assert not reader.finished
        # Rejected messages give no batch with events, but the position passes them.
        cluster.send(config.topic, 0, [b"x", b"y"])
        until(lambda: (reader.take(0.5) is not None) and reader.position[0] == [2, 0, 0, 2])
        assert reader.position[3][0] == 10
        assert reader.lag().waiting == 0 or not reader.finished


def test_a_new_run_may_begin_at_the_end(cluster):
    config = cluster.published(EVENTS, 1).model_copy(update={"begin": "latest"})
    ends = {p: [len(own["time_ms"]), 0, 0, 0] for p, own in by_partition(EVENTS).items()}
    with KafkaSource(config, SPEC).connect().open(ALL) as reader:
        assert reader.position == ends
        assert reader.take() is None


@pytest.mark.parametrize("per_message", [1, 100])
def test_memory_is_bounded_when_partitions_are_far_apart(cluster, per_message, monkeypatch):
    # In event time one partition follows the other: the merge needs one at a time, but the broker sends all at once.
    events = random_events(seed=4, events=16_000, span_ms=10_000)
    owner = partition_of(events["user_id"], PARTITIONS)
    events["time_ms"] = START_MS + 100_000 * owner + np.arange(16_000)
    config = cluster.published(events, per_message, batch_events=100, queue_batches=1, buffer_events=2000)
    held = []

    class Watched(kafka_source._KafkaFeed):
        def _poll(self) -> None:
            super()._poll()
            held.append(self._merge.events)

    monkeypatch.setattr(kafka_source, "_KafkaFeed", Watched)
    assert events_of(read(config)) == merged(events, ALL)
    assert 700 < max(held) <= 2000 + 100


def test_the_source_of_a_config_and_its_identity(cluster):
    config = cluster.published(EVENTS, 1)
    source = open_source(config, SPEC, "unused")
    assert source.partitions == PARTITIONS
    identity = source.identity
    assert identity["topic"] == config.topic
    with pytest.raises(UserError, match="is of topic"):
        check_identity({**identity, "topic": "other"}, identity)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense=1"], "nonsense"),
        (["# comment", "", "no equals"], "line 3: write key=value"),
        (["enable.auto.commit=true"], "line 1: enable.auto.commit cannot be set here"),
        (["bootstrap.servers=x"], "line 1: bootstrap.servers cannot be set here"),
    ],
)
def test_properties_are_checked(cluster, properties, lines, message):
    with pytest.raises(UserError, match=message):
        KafkaSource(cluster.config("any", properties=properties(*lines)), SPEC).connect()


def test_a_missing_properties_file(cluster, tmp_path):
    with pytest.raises(UserError, match=r"stream.properties = '.*none': cannot be read"):
        KafkaSource(cluster.config("any", properties=str(tmp_path / "none")), SPEC).connect()


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


def by_user(message) -> int:
    decoded = MessageCodec("json", SPEC, 0).decode([message.value()], START_MS * 2)
    return int(decoded.events["user_id"][0])


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
