"""Segments of a Kafka topic over the real protocol: every one once, from any position, and gaps."""

from __future__ import annotations

import json

import pytest

from tests.semantic_ids.follow_parts import ManualClock, message
from tests.stream.conftest import PARTITIONS, Cluster, cluster, own_cluster
from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.semantic_ids.segment_source import LiveSegment, RejectedMessage
from trainer.semantic_ids.segment_source_kafka import KafkaSegments

__all__ = ["cluster", "own_cluster"]


def dump(*values: object) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values)


def read(config: StreamConfig, position: dict, limit: int = 7) -> tuple[list[LiveSegment], list[RejectedMessage], list]:
    source = KafkaSegments(config, json.loads(json.dumps(position)), ManualClock())
    segments, rejected, positions = [], [], []
    while not source.finished:
        batch = source.take(limit, 0.2)
        segments += batch.segments
        rejected += batch.rejected
        positions.append((len(segments), batch.position))
    source.close()
    return segments, rejected, positions


def test_every_segment_once_from_any_position(cluster: Cluster) -> None:
    topic = cluster.topic()
    for p in range(PARTITIONS):
        singles = [dump(message(p, number)) for number in range(5)]
        several = [dump(message(p, 5), message(p, 6)), dump([message(p, 7), message(p, 8)])]
        cluster.send(topic, p, [*singles, *several])
    config = cluster.config(topic)
    segments, rejected, positions = read(config, {})
    assert sorted((one.item_id, one.segment) for one in segments) == [
        (p, n) for p in range(PARTITIONS) for n in range(9)
    ]
    assert not rejected
    for count, position in positions[:: max(1, len(positions) // 4)]:
        rest = read(config, position)[0]
        assert {one.id for one in rest} == {one.id for one in segments[count:]} and len(rest) == len(segments) - count


def test_a_bad_message_is_rejected_with_its_place_and_the_good_segments_beside_it_stay(cluster: Cluster) -> None:
    topic = cluster.topic()
    mixed = dump(message(1, 0), {"item_id": 1}, message(1, 1))
    cluster.send(topic, 0, [b"nonsense", None, b"", b"  ", b"\xff\xfe", mixed, b"[[]]"])
    segments, rejected, _ = read(cluster.config(topic), {})
    assert [one.segment for one in segments] == [0, 1]
    assert sorted(one.place.removeprefix(f"{topic}/0/") for one in rejected) == [
        *("0", "1", "2", "3", "4", "5 segment 1", "6")
    ]


def test_another_topic_is_read_from_its_beginning_and_a_lost_one_is_an_error(cluster: Cluster) -> None:
    one, other = cluster.topic(), cluster.topic()
    for topic in (one, other):
        cluster.send(topic, 0, [dump(message(1, number)) for number in range(3)])
    position = read(cluster.config(one), {})[2][-1][1]
    assert len(read(cluster.config(other), position)[0]) == 3
    beyond = {key: 99 if key.endswith("/0") else place for key, place in position.items()}
    with pytest.raises(UserError, match="the saved position is offset 99, the topic ends at 3"):
        read(cluster.config(one), beyond)
    latest = cluster.config(one, begin="latest")
    assert read(latest, {})[0] == []


def test_a_partition_that_was_added_while_the_job_was_away_is_read_from_its_beginning(cluster: Cluster) -> None:
    topic = cluster.topic()
    latest = cluster.config(topic, begin="latest")
    source = KafkaSegments(latest, {}, ManualClock())
    position = source.take(1, 0.0).position
    source.close()
    for p in (0, 1):
        cluster.send(topic, p, [dump(message(p, number)) for number in range(3)])
    before = {key: place for key, place in position.items() if not key.endswith("/1")}
    assert len(position) == PARTITIONS and len(before) == PARTITIONS - 1
    assert sorted(one.item_id for one in read(latest, before)[0]) == [0, 0, 0, 1, 1, 1]


def test_brokers_that_are_gone_are_named(own_cluster: Cluster) -> None:
    config = own_cluster.config(own_cluster.topic(), retry_seconds=0.5)
    brokers = own_cluster.brokers
    own_cluster.close()
    with pytest.raises(UserError, match=rf"no Kafka broker answers at {brokers} .*\(follow\.retry_seconds\)"):
        KafkaSegments(config, {}, ManualClock())
