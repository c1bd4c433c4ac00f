"""Segment vectors of a dataset: by row number and by text id, with rooms, authors, times and ranges of time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.importers.test_kuailive_m3 import write_source
from tests.semantic_ids.segment_world import START_MS, world_vectors, write_segments, write_vectors, write_world
from trainer.config.quantize import QuantizeDataConfig
from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.data.format.text_schema import segment_ids
from trainer.data.importers.kuailive_m3 import import_kuailive_m3
from trainer.data.simulator.write_dataset import simulate
from trainer.semantic_ids.segments import SegmentVectors, TimeRange, hash_vectors


def test_vectors_by_row_number(tmp_path: Path) -> None:
    write_segments(tmp_path, np.array([9, 4, 9, 8]), np.array([70, 50, 60, 40]), {4: 1, 9: 2, 5: 3, 8: 4})
    items = pa.table({"item_id": [4, 9, 5, 8], "author_id": pa.array([1, 2, 3, None], pa.int64())})
    pq.write_table(items, tmp_path / "items.parquet")
    write_vectors(tmp_path, world_vectors(1, 3), np.array([0, 1, 3]))
    segments = SegmentVectors.open(str(tmp_path))
    assert segments.item_id.tolist() == [9, 4, 8] and segments.author_id.tolist() == [2, 1, -1]
    assert segments.known_ms.tolist() == [70, 50, 40] and segments.without_vector == 1
    assert segments.rows(TimeRange(40, 70)).tolist() == [1, 2] and segments.rows(TimeRange()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("known", [False, True])
def test_vectors_by_text_id(tmp_path: Path, known: bool) -> None:
    write_segments(tmp_path, np.empty(0, np.int64), np.empty(0, np.int64), {70: 5, 71: 6})
    item_id, segment, start_ms = np.array([71, 70, 70]), np.array([0, 1, 0]), np.array([1000, 31_000, 1000])
    columns = {"item_id": item_id, "segment": segment.astype(np.int32), "start_ms": start_ms}
    columns |= {"known_ms": start_ms + 45_000} if known else {}
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({**columns, "text": ["a", "b", "c"]}), tmp_path / "texts/segments.parquet")
    origin = Origin(model="m", template={"segments": "{text}"}, hash="ab")
    table = tmp_path / "tables/segments"
    ContentVectors.write(table, segment_ids(item_id, segment)[:2], world_vectors(1, 2), origin=origin)
    segments = SegmentVectors.open(str(tmp_path), str(table))
    later = 45_000 if known else 30_000
    assert segments.table.ids.tolist() == segment_ids(np.array([70, 71]), np.array([1, 0])).tolist()
    assert segments.item_id.tolist() == [70, 71] and segments.author_id.tolist() == [5, 6]
    assert segments.known_ms.tolist() == [31_000 + later, 1000 + later] and segments.without_vector == 1


def test_a_segment_of_the_texts_is_there_once(tmp_path: Path) -> None:
    write_segments(tmp_path, np.empty(0, np.int64), np.empty(0, np.int64), {70: 5})
    (tmp_path / "texts").mkdir()
    segment = np.array([0, 1, 1], np.int32)
    columns = {"item_id": [70] * 3, "segment": segment, "start_ms": [0, 30_000, 60_000], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(columns), tmp_path / "texts/segments.parquet")
    origin = Origin(model="m", template={"segments": "{text}"}, hash="ab")
    ContentVectors.write(
        tmp_path / "embeddings/segments", segment_ids(np.full(2, 70), segment[:2]), world_vectors(1, 2), origin=origin
    )
    with pytest.raises(UserError, match=r"texts/segments.parquet: has segment 1 of item 70 twice"):
        SegmentVectors.open(str(tmp_path))


def test_authors_may_come_from_the_texts(tmp_path: Path) -> None:
    write_world(tmp_path, rooms=2, segments=3)
    (tmp_path / "texts").mkdir()
    (tmp_path / "items.parquet").rename(tmp_path / "texts/items.parquet")
    assert SegmentVectors.open(str(tmp_path)).author_id.tolist() == [100] * 6
    (tmp_path / "texts/items.parquet").unlink()
    with pytest.raises(UserError, match=r"has neither items.parquet nor texts/items.parquet"):
        SegmentVectors.open(str(tmp_path))


def test_neighbours_follow_each_other_in_a_room_within_five_minutes(tmp_path: Path) -> None:
    room = np.array([1, 2, 1, 1, 2, 1, 1])
    known_ms = np.array([30_000, 0, 0, 30_000, 300_000, 330_001, 330_002])
    write_segments(tmp_path, room, known_ms, {1: 1, 2: 2})
    write_vectors(tmp_path, world_vectors(1, 7))
    segments = SegmentVectors.open(str(tmp_path))
    earlier, later = segments.neighbours(np.arange(7))
    # Of one time, the smaller id comes first; 30,000 to 330,001 is too long.
    assert sorted(zip(earlier.tolist(), later.tolist(), strict=True)) == [(0, 3), (1, 4), (2, 0), (5, 6)]
    earlier, later = segments.neighbours(np.array([0, 2, 6]))
    assert list(zip(earlier.tolist(), later.tolist(), strict=True)) == [(1, 0)]


def test_the_hash_covers_the_range_only(tmp_path: Path) -> None:
    vectors = world_vectors(4, 10)
    write_world(tmp_path, rooms=4, segments=10)
    write_vectors(tmp_path, vectors)

    def digest(until_segment: int) -> str:
        segments = SegmentVectors.open(str(tmp_path))
        return hash_vectors(segments, segments.rows(TimeRange(until_ms=START_MS + (until_segment + 1) * 30_000)))

    first, later = digest(5), digest(6)
    vectors.reshape(4, 10, -1)[:, 5:] += 1
    write_vectors(tmp_path, vectors)
    assert digest(5) == first and digest(6) != later != first
    with pytest.raises(UserError, match=r"no segment became known in the range of time"):
        digest(0)


def data_config(**keys: str) -> QuantizeDataConfig:
    return QuantizeDataConfig(path="p", **keys)


def test_ranges_of_time_are_in_the_time_zone_of_the_dataset(tmp_path: Path) -> None:
    write_world(tmp_path, rooms=2, segments=3)
    segments = SegmentVectors.open(str(tmp_path))
    fit, held_out = segments.ranges(data_config(fit_until="2024-03-04T08:00+08:00"))
    assert fit == TimeRange(0, START_MS) and held_out is not None and held_out.from_ms == START_MS
    assert segments.ranges(data_config(fit_from="2024-03-04"))[1] is None
    earlier = data_config(fit_from="2024-03-04", eval_from="2024-03-03", eval_until="2024-03-04")
    fit, held_out = segments.ranges(earlier)
    assert fit == TimeRange(START_MS) and held_out == TimeRange(START_MS - 86_400_000, START_MS)
    for keys in (
        {"fit_from": "2024-03-04", "fit_until": "2024-03-04"},
        {"eval_from": "2024-03-05", "eval_until": "2024-03-04"},
    ):
        with pytest.raises(UserError, match=r"_until = '2024-03-04' must be later than data\.\w+_from"):
            segments.ranges(data_config(**keys))
    with pytest.raises(UserError, match=r"--until = '2024-03-04' must be later than --from"):
        segments.time_range("2024-03-04", "2024-03-04")
    assert segments.time_range("1960-01-01", "1970-01-01T00:01") == TimeRange(0, 60_000)
    with pytest.raises(UserError, match=r"--until = '1970-01-01' must be later than --from"):
        segments.time_range("1960-01-01", "1970-01-01")


def test_a_held_out_range_does_not_overlap_the_fit(tmp_path: Path) -> None:
    segments = SegmentVectors.open(str(write_world(tmp_path, rooms=2, segments=3)))
    for keys in (
        {"fit_until": "2024-03-05", "eval_from": "2024-03-04T23:59:59.999"},
        {"fit_from": "2024-03-05", "eval_from": "2024-03-01"},
        {"eval_from": "2024-03-05"},
        {"fit_from": "2024-03-04", "eval_from": "2024-03-03", "eval_until": "2024-03-04T00:00:00.001"},
    ):
        with pytest.raises(UserError, match=r"data.eval_from = '2024-03-\S+': the held-out range overlaps"):
            segments.ranges(data_config(**keys))
    fit, held_out = segments.ranges(data_config(fit_until="2024-03-05", eval_from="2024-03-05"))
    assert held_out is not None and held_out.from_ms == fit.until_ms


def test_a_dataset_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    def message(vectors: str = "") -> str:
        with pytest.raises(UserError) as error:
            SegmentVectors.open(str(tmp_path), vectors)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no dataset here" in message()
    write_world(tmp_path, rooms=2, segments=3)
    assert "nowhere: no embedding table here" in message("nowhere")
    assert "segment vectors are memory-mapped; copy them to a local path" in message("s3://bucket/vectors")
    write_vectors(tmp_path, world_vectors(1, 7))
    assert "has a vector of segment 6, which" in message()
    write_vectors(tmp_path, world_vectors(1, 7)[:0])
    assert "has no vectors" in message()
    write_vectors(tmp_path, world_vectors(2, 3))
    table = pq.read_table(tmp_path / "segments.parquet")
    pq.write_table(table.drop_columns(["known_ms"]), tmp_path / "segments.parquet")
    assert "segments.parquet: has no known_ms" in message()
    known_ms = table["known_ms"].to_numpy()
    for values, expected in (
        (pa.array([None] + [1] * 5, pa.int64()), "column 'known_ms' has 1 empty values"),
        (pa.array([1.5] * 6), "column 'known_ms' is of the type double; whole numbers are accepted"),
        (pa.array(known_ms).cast(pa.timestamp("ms")), "is of the type timestamp[ms]"),
        (pa.array([-1] * 6), "known_ms is -1; 0 or more is accepted"),
    ):
        pq.write_table(table.set_column(1, "known_ms", values), tmp_path / "segments.parquet")
        assert expected in message()
    early = table.append_column("start_ms", pa.array(known_ms - 30_000 + (np.arange(6) == 4)))
    pq.write_table(early, tmp_path / "segments.parquet")
    assert "segments.parquet: row 4: known_ms is" in message() and "before the end of the segment" in message()
    (tmp_path / "segments.parquet").unlink()
    assert "segments.parquet: no such file, so the rooms of the vectors are not known" in message()
    (tmp_path / "embeddings/segments/manifest.json").write_text(json.dumps({"version": 1}))
    assert "manifest.json: damaged" in message()


def test_the_simulated_world_and_kuailive_m3_are_read(tmp_path: Path) -> None:
    """Every segment has a vector and an author, and becomes known after its end."""
    simulate(tmp_path / "world", users=20, days=1, partitions=1, seed=1, segment_noise=0.8)
    segments = SegmentVectors.open(str(tmp_path / "world"))
    stored = pq.read_table(tmp_path / "world/segments.parquet")
    items = pq.read_table(tmp_path / "world/items.parquet")
    author = dict(zip(items["item_id"].to_pylist(), items["author_id"].to_pylist(), strict=True))
    assert len(segments) == stored.num_rows > 1000 and segments.without_vector == 0
    assert segments.author_id.tolist() == [author[item] for item in stored["item_id"].to_pylist()]
    assert (segments.known_ms >= stored["start_ms"].to_numpy() + 30_000).all()
    (tmp_path / "log").mkdir()
    import_kuailive_m3(write_source(tmp_path / "log"), tmp_path / "kuailive", 1)
    segments = SegmentVectors.open(str(tmp_path / "kuailive"))
    assert segments.item_id.tolist() == [17, 15, 15] and (segments.author_id >= 0).all()
