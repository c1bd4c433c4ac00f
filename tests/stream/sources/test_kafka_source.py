"""Tests of Kafka topics over the real protocol: every event once, from any position.

The brokers are librdkafka's mock cluster in this process; ``make test-kafka BROKERS=...`` runs the same on real ones.
"""

from __future__ import annotations

import numpy as np
import pytest

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
)
from tests.stream.random_logs import SPEC
from tests.stream.sources.kafka_reading import ALL, EVENTS, part, read, until
from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.stream.sources import kafka_source
from trainer.stream.sources.kafka_source import KafkaSource
from trainer.stream.sources.kafka_topic import TopicPublisher
from trainer.stream.sources.message_codec import MessageCodec
from trainer.stream.sources.open_source import open_source
from trainer.stream.sources.source import check_identity


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
