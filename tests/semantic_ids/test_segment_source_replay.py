"""Replay of a dataset's segments: in the order in which they became known, at a speed, from any position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.semantic_ids.follow_parts import ManualClock
from trainer.console.errors import UserError
from trainer.data.writing.text_writer import TextWriter
from trainer.semantic_ids.segment_source_replay import ReplaySegments

ROOMS, SEGMENTS = 4, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "dataset"
    writer = TextWriter(path)
    rooms = np.array([30, 10, 20])
    zeros = np.zeros(3, np.int64)
    columns = {"item_id": rooms, "author_id": rooms + 1, "domain": zeros, "duration_ms": zeros}
    writer.add("items", pa.table({**columns, "tag": [""] * 3, "text": ["room"] * 3}))
    item, segment = np.repeat([10, 20, 30, 40], SEGMENTS), np.tile(np.arange(SEGMENTS), ROOMS)
    start_ms = 1_000_000 + 30_000 * segment + item
    texts = [f"{room} says {number}" for room, number in zip(item, segment, strict=True)]
    writer.add("segments", pa.table({"item_id": item, "segment": segment, "start_ms": start_ms, "text": texts}))
    writer.finish()
    return path


def test_segments_come_in_the_order_in_which_they_became_known(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ReplaySegments(str(dataset), 0.0, {}, ManualClock())
    found, positions = [], []
    while not source.finished:
        batch = source.take(5, 1.0)
        found += batch.segments
        positions.append((len(found), batch.position))
    assert [(one.segment, one.item_id) for one in found] == [(s, i) for s in range(SEGMENTS) for i in (10, 20, 30)]
    assert all(one.known_ms == 1_030_000 + 30_000 * one.segment + one.item_id for one in found)
    assert all(one.author_id == one.item_id + 1 and one.text == f"{one.item_id} says {one.segment}" for one in found)
    assert source.without_author == SEGMENTS
    assert f"{SEGMENTS} segments are left out, their rooms have no author" in capsys.readouterr().out
    for count, position in positions:
        rest = ReplaySegments(str(dataset), 0.0, position, ManualClock()).take(100, 1.0)
        assert [one.id for one in rest.segments] == [one.id for one in found[count:]]


def test_at_a_speed_segments_come_when_they_are_due(dataset: Path) -> None:
    clock = ManualClock()
    began = clock.now
    source = ReplaySegments(str(dataset), 60.0, {}, clock)
    arrivals = []
    while not source.finished:
        batch = source.take(100, 10.0)
        arrivals += [(one.known_ms, one.arrived_ms) for one in batch.segments]
        assert all(one.arrived_ms <= clock.now * 1000 + 1 for one in batch.segments)
    assert clock.now - began == pytest.approx((30_000 * (SEGMENTS - 1) + 20) / 60_000, abs=0.01)
    for known_ms, arrived_ms in arrivals:
        assert arrived_ms - began * 1000 == pytest.approx((known_ms - arrivals[0][0]) / 60, abs=1)


def test_another_dataset_is_replayed_from_its_beginning(dataset: Path) -> None:
    source = ReplaySegments(str(dataset), 0.0, {"replay": [7, "another"]}, ManualClock())
    assert source.take(1, 0).segments[0].segment == 0


def test_a_dataset_without_segments_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no texts/segments\.parquet"):
        ReplaySegments(str(tmp_path), 0.0, {}, ManualClock())
