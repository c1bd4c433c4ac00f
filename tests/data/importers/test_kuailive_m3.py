"""Tests of the KuaiLive-M3 importer on small files in the published layout, with its pitfalls."""

import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.shards import read_rows
from trainer.data.format.text_schema import read_texts
from trainer.data.importers import columns as part
from trainer.data.importers import table_files as tables
from trainer.data.importers.kuailive_m3 import BEHAVIOURS, import_kuailive_m3

T0 = 1_746_374_400_000  # 5 May 2025, 00:00 in Shanghai, a Monday
Lines = dict[str, list[Any]]


def clock(*seconds: float) -> list[str]:
    """Return times as text in Shanghai time without an offset."""
    local = (datetime.fromtimestamp(T0 / 1000 + 8 * 3600 + second, UTC) for second in seconds)
    return [moment.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] for moment in local]


def stamps(*seconds: float) -> pa.Array:
    """Return times as Arrow timestamps in Shanghai time."""
    return pa.array([T0 + 8 * 3_600_000 + round(1000 * second) for second in seconds], pa.timestamp("ms"))


_RNG = np.random.default_rng(0)
PHOTO_VECTORS, SEGMENT_VECTORS = _RNG.standard_normal((2, 128)), _RNG.standard_normal((3, 128))

CSV: dict[str, Lines] = {
    "author_profile": {
        "author_id": [900, 901],
        "is_photo_author": [1, 0],
        "is_live_author": [1, 1],
        "gender": ["M", "U"],
        "age_segment": ["24-30", "unknown"],
        "fans_user_num": ["0-1k", "1000w+"],
    },
    "live_interaction": {
        "user_id": [5, 5, 6],
        "author_id": [900, 900, 901],
        "live_id": [7, 7, 8],
        "live_play_start_timestamp": clock(100, 10, 200),
        "live_play_end_timestamp": clock(180, 40.5, 210),
        "p_date": ["20250505"] * 3,
        "live_source_category": ["feed", "follow", "search"],
        "enter_live_action": ["click", "slide", "auto"],
        "is_auto_play": [0, 0, 1],
        "is_follow_enter": [0, 0, 1],
        "is_follow_leave": [1, 0, 1],
        "play_duration": [80_000, 16_000, 9_000],
        "like_cnt": [1, 3, 0],
        "comment_cnt": [2, 0, 0],
        "send_gift_cnt": [0, 1, 0],
        "send_gift_num": [0, 7, 0],
        "follow_author_cnt": [1, 0, 0],
        "cancel_follow_author_cnt": [0, 0, 1],
        "share_cnt": [0, 0, 0],
        "report_live_cnt": [0, 0, 1],
    },
    "live_comment": {
        "live_stream_id": [7, 7, 8],
        "user_id": [5, 5, 9],
        "author_id": [900, 900, 901],
        "content": ['hello, "you"\nthere', "", "nobody's"],
        "comment_ts": [T0 + 120_000, T0 + 130_000, T0 + 1],
    },
    "live_like": {"user_id": [5, 5], "live_id": [7, 7], "like_timestamp": clock(20, 30)},
    "live_share": {
        "user_id": [6, 5],
        "live_id": [8, 7],
        "author_id": [901, 900],
        "share_timestamp": clock(300, 110),
        "is_share_success": [1, 0],
    },
    "photo_tag": {
        "photo_id": [8, 7],
        "first_level_category_name": ["food", "music"],
        "second_level_category_name": ["noodles", "piano"],
        "third_level_category_name": ["", ""],
        "fourth_level_category_name": ["", ""],
    },
}
PARQUET: dict[str, Lines] = {
    "live_show": {
        "live_id": [8, 7],
        "user_id": [5, 5],
        "author_id": [901, 900],
        # The second is the visit of the room in live_interaction.csv: that one stays.
        "show_timestamp": stamps(90, 100),
    },
    "live_room_meta": {
        "live_id": [7, 8, 7],
        "author_id": [900, 901, 900],
        "live_name": ["welcome", None, "welcome again"],
        "start_timestamp": stamps(-20, 150, 30),
        "end_timestamp": stamps(9_000, 9_000, 90_000),
        "live_duration": [1, 2, 3],
    },
    "photo_play": {
        "user_id": [5, 5],
        "photo_id": [7, 8],
        "author_id": [900, 901],
        "enter_timestamp": stamps(1, 60),
        "leave_timestamp": stamps(6, 61),
        "enter_play_type": ["click", "slide"],
        "is_complete_play": [1, 0],
        "like_status_type": [3, 1],
        "is_follow_before_play": [0, 1],
        "is_follow_after_play": [1, 1],
    },
    "photo_meta": {
        "photo_id": [7, 8],
        "author_id": [900, 901],
        "duration": [5_000, 60_000],
        "display_type": [1, 1],
        "cover_title": ["a sonata", None],
        "video_texts": ["first movement", None],
    },
    "photo_emb_128": {"photo_id": [8, 7], "feature": [list(vector) for vector in PHOTO_VECTORS]},
    "live_emb_128_ts/part-0": {
        "live_stream_id": ["8", "7"],
        "segment_id": ["a", "b"],
        "feature_128": [list(vector) for vector in SEGMENT_VECTORS[:2]],
        "timestamp": [T0 + 230_000, T0 + 25_000],
    },
    "live_emb_128_ts/part-1": {
        "live_stream_id": ["7"],
        "segment_id": ["c"],
        "feature_128": [list(SEGMENT_VECTORS[2])],
        "timestamp": [T0 + 50_000],
    },
}


def write_csv(folder: Path, name: str, columns: Lines) -> None:
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_source(folder: Path) -> Path:
    (folder / "live_emb_128_ts").mkdir(parents=True)
    for name, columns in CSV.items():
        write_csv(folder, name, columns)
    for name, columns in PARQUET.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def rows_of(out: Path) -> tuple[DatasetSpec, dict[str, np.ndarray]]:
    spec = DatasetSpec.load(out)
    rows = read_rows(str(out), spec)
    order = np.argsort(rows["visit_id"])
    return spec, {name: column[order] for name, column in rows.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "src")


def test_live_rooms_are_the_candidates(source: Path, tmp_path: Path) -> None:
    import_kuailive_m3(source, tmp_path / "out", 3)
    spec, rows = rows_of(tmp_path / "out")
    assert (spec.name, spec.rows, spec.exposures) == ("KuaiLive-M3", 4, 6)
    assert spec.extra["duplicates_dropped"] == 1, "shown and entered in one millisecond"
    assert spec.extra["orphans_dropped"] == 1, "a comment of somebody who was not there"
    assert rows["user_id"].tolist() == [5, 5, 6, 5]
    assert rows["item_id"].tolist() == [15, 15, 17, 17], "2 * live_id + 1"
    assert rows["author_id"].tolist() == [900, 900, 901, 901]
    assert (rows["request_ms"] - T0).tolist() == [100_000, 10_000, 200_000, 90_000]
    happened = [
        {name for name, label in zip(BEHAVIOURS, labels, strict=True) if label} for labels in rows["label"].tolist()
    ]
    assert happened == [
        # The share did not succeed; one like is counted, without a time.
        {"click", "effective_view", "long_view", "like", "comment", "follow"},
        {"click", "effective_view", "like", "gift"},
        # By autoplay, nine seconds, and shared a minute and a half after the end.
        {"share"},
        set(),
    ]
    assert (rows["emit_ms"] - T0).tolist() == [180_000, 40_500, 300_000, 90_000]
    assert spec.applies["click"] == ("live",) and set(spec.applies["follow"]) == {"live", "video"}


def test_events_have_their_own_times_or_that_of_the_end(source: Path, tmp_path: Path) -> None:
    import_kuailive_m3(source, tmp_path / "out", 1)
    events = pq.read_table(tmp_path / "out" / "events" / "part-00000.parquet").to_pylist()

    def of(visit: int) -> list[tuple[str, int, float]]:
        names = (*BEHAVIOURS, "exit")
        own_events = (event for event in events if event["visit_id"] == visit and event["event"] in names)
        return [(event["event"], event["time_ms"] - T0, event["value"]) for event in own_events]

    assert of(0) == [
        ("click", 100_000, 0),
        ("effective_view", 115_000, 0),
        ("comment", 120_000, 0),
        ("comment", 130_000, 0),
        ("long_view", 160_000, 0),
        ("like", 180_000, 0),
        ("follow", 180_000, 0),
        ("exit", 180_000, 80_000),
    ]
    assert of(1) == [
        ("click", 10_000, 0),
        ("like", 20_000, 0),
        ("effective_view", 25_000, 0),
        ("like", 30_000, 0),
        ("gift", 40_500, 7),
        ("exit", 40_500, 16_000),
    ]


def test_videos_feed_the_histories(source: Path, tmp_path: Path) -> None:
    import_kuailive_m3(source, tmp_path / "out", 1)
    spec = DatasetSpec.load(tmp_path / "out")
    history = Histories(tmp_path / "out", spec)
    found = history.latest(np.array([5]), np.array([T0 + 61_001]), domain=0, length=9)
    assert found.item_id.tolist() == [14, 16], "2 * photo_id: no room's id"
    assert found.author_id.tolist() == [900, 901]
    assert [[BEHAVIOURS[k] for k in range(8) if bits >> k & 1] for bits in found.bits] == [
        ["effective_view", "long_view", "follow"],
        [],
    ]
    assert [spec.extra["vocabularies"]["category_2"][code - 1] for code in found.tag] == ["piano", "noodles"]
    before = history.latest(np.array([5]), np.array([T0 + 6_000]), domain=0, length=9)
    assert len(before.item_id) == 0, "a play is known from its end on"
    assert history.latest(np.array([5]), np.array([T0 + 40_501]), domain=1, length=9).item_id.tolist() == [15]


def test_no_feature_knows_the_future_or_the_label(source: Path, tmp_path: Path) -> None:
    import_kuailive_m3(source, tmp_path / "out", 1)
    spec, rows = rows_of(tmp_path / "out")
    assert [side.name for side in spec.side] == [
        "author_gender",
        "author_age",
        "category_1",
        "category_2",
        "hour",
        "weekday",
    ]
    assert spec.extra["vocabularies"]["author_gender"] == ["M"] and spec.extra["vocabularies"]["author_age"] == [
        "24-30"
    ]
    assert rows["side"].tolist() == [[1, 1, 0, 0, 1, 1]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2
    assert [dense.name for dense in spec.dense] == ["log_room_age_s"]
    # Room 8 was shown before the start that its line tells; room 7's first line has its start.
    np.testing.assert_allclose(np.expm1(rows["dense"][:, 0]), [120, 30, 50, 0], rtol=1e-5)
    stored = set(pq.read_schema(tmp_path / "out" / "items.parquet").names)
    assert not stored & {"end_timestamp", "end_ms", "live_duration"}

    # Whatever the columns of the future and of the outcome say, the features stay.
    later = dict(PARQUET["live_room_meta"]) | {"end_timestamp": stamps(99, 99, 99), "live_duration": [9, 9, 9]}
    pq.write_table(pa.table(later), source / "live_room_meta.parquet")
    other = dict(CSV["live_interaction"]) | {"is_follow_enter": [1, 1, 0], "live_source_category": ["a", "b", "c"]}
    write_csv(source, "live_interaction", other | {"enter_live_action": ["x"] * 3, "is_follow_leave": [0, 1, 0]})
    import_kuailive_m3(source, tmp_path / "changed", 1)
    changed = rows_of(tmp_path / "changed")[1]
    for name in rows:
        np.testing.assert_array_equal(rows[name], changed[name], err_msg=name)


def test_texts(source: Path, tmp_path: Path) -> None:
    import_kuailive_m3(source, tmp_path / "out", 2)
    comments = read_texts(tmp_path / "out", "comments").to_pydict()
    assert comments["comment_id"] == [0, 1, 2]
    assert comments["item_id"] == [15, 15, 17] and comments["user_id"] == [5, 5, 9]
    assert comments["time_ms"] == [T0 + 120_000, T0 + 130_000, T0 + 1]
    assert comments["text"] == ['hello, "you"\nthere', "", "nobody's"]
    items = {line["item_id"]: line for line in read_texts(tmp_path / "out", "items").to_pylist()}
    assert {item: line["text"] for item, line in items.items()} == {
        14: "a sonata\nfirst movement",
        15: "welcome",
        16: "",
        17: "",
    }
    assert (items[14]["tag"], items[14]["duration_ms"], items[14]["domain"]) == ("piano", 5_000, 0)
    assert (items[15]["tag"], items[15]["duration_ms"], items[15]["domain"]) == ("", 0, 1)


def test_vectors(source: Path, tmp_path: Path) -> None:
    import_kuailive_m3(source, tmp_path / "out", 2)
    videos = ContentVectors.open(tmp_path / "out" / "embeddings" / "items")
    assert videos.ids.tolist() == [14, 16]
    np.testing.assert_allclose(videos.vectors, PHOTO_VECTORS[::-1], atol=2e-3)
    segments = pq.read_table(tmp_path / "out" / "segments.parquet").to_pydict()
    assert segments["item_id"] == [17, 15, 15]
    assert segments["known_ms"] == [T0 + 230_000, T0 + 25_000, T0 + 50_000], "a segment is known from its end on"
    table = ContentVectors.open(tmp_path / "out" / "embeddings" / "segments")
    np.testing.assert_allclose(table.vectors[table.lookup(np.array(segments["vector"]))], SEGMENT_VECTORS, atol=2e-3)
    own = DatasetSegments.read(str(tmp_path / "out"), embedded=False)
    assert table.segments == own.hash(np.arange(3)) and videos.segments == ""


def test_blocks_and_partitions_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_kuailive_m3(source, tmp_path / "whole", 1)
    with monkeypatch.context() as patch:
        whole = tables.read_batches
        patch.setattr(tables, "_BATCH_ROWS", 1)
        patch.setattr(
            part,
            "read_batches",
            lambda file, types, multiline: whole(file, types, block_bytes=1 << 9, multiline=multiline),
        )
        import_kuailive_m3(source, tmp_path / "blocks", 4)
    one, other = rows_of(tmp_path / "whole")[1], rows_of(tmp_path / "blocks")[1]
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    for table in ("items", "comments"):
        assert read_texts(tmp_path / "whole", table).equals(read_texts(tmp_path / "blocks", table))
    for name in ("items", "segments"):
        pair = [ContentVectors.open(tmp_path / where / "embeddings" / name) for where in ("whole", "blocks")]
        np.testing.assert_array_equal(pair[0].vectors, pair[1].vectors)


@pytest.mark.parametrize(
    ("name", "column", "values", "message"),
    [
        (
            "live_interaction",
            "live_play_end_timestamp",
            clock(99, 40, 210),
            r"row 1: column 'live_play_end_.* no earlier",
        ),
        (
            "live_interaction",
            "play_duration",
            [1, "x", 2],
            r"row 2: column 'play_duration' is 'x'; it must be a finite",
        ),
        (
            "live_interaction",
            "live_id",
            [7, 7, 1 << 62],
            r"row 3: column 'live_id' is '4611686018427387904'; .* at most",
        ),
        ("live_interaction", "like_cnt", None, r"live_interaction\.csv: column 'like_cnt' is missing"),
        ("live_comment", "comment_ts", [T0, "soon", T0], r"live_comment\.csv: row 2: column 'comment_ts' is 'soon'"),
        ("live_like", "like_timestamp", [*clock(1), ""], r"live_like\.csv: row 2: column 'like_timestamp' is empty"),
        (
            "author_profile",
            "author_id",
            [900, 900],
            r"author_profile\.csv: row 2: column 'author_id' is .*900.* only once",
        ),
        ("photo_tag", "photo_id", [8, 8], r"photo_tag\.csv: row 2: column 'photo_id' is 8; .* only once"),
        ("photo_meta", "photo_id", [7, 7], r"photo_meta\.parquet: row 2: column 'photo_id' is 7"),
        ("photo_meta", "duration", [-5, 0], r"photo_meta\.parquet: row 1: column 'duration' is -5; .*milliseconds"),
        ("photo_play", "leave_timestamp", stamps(0, 61), r"photo_play\.parquet: row 1: column 'leave_timestamp'"),
        ("photo_play", "user_id", [5, None], r"photo_play\.parquet: row 2: column 'user_id' is empty"),
        ("photo_emb_128", "feature", [[1.0] * 128, [1.0] * 64], r"row 2: column 'feature' has 64 numbers; .* 128"),
        (
            "photo_emb_128",
            "feature",
            [[1.0] * 128, [np.nan] * 128],
            r"row 2: column 'feature' has a number .* not finite",
        ),
        ("photo_emb_128", "feature", [[1e9] * 128, [1.0] * 128], r"row 1: column 'feature' has a number .* 65504"),
        ("photo_emb_128", "feature", ["a", "b"], r"row 1: column 'feature' is 'a'; it must be a list of 128 numbers"),
        ("photo_emb_128", "photo_id", [7, 7], r"photo_emb_128\.parquet: row 2: column 'photo_id' is 7; .* only once"),
        ("live_emb_128_ts/part-1", "live_stream_id", ["room"], r"part-1\.parquet: row 1: column 'live_stream_id' is"),
    ],
)
def test_mistakes_name_file_row_and_column(
    source: Path, tmp_path: Path, name: str, column: str, values: Any, message: str
) -> None:
    columns = dict(CSV.get(name) or PARQUET[name])
    if values is None:
        del columns[column]
    else:
        columns[column] = values
    if name in CSV:
        write_csv(source, name, columns)
    else:
        pq.write_table(pa.table(columns), source / f"{name}.parquet")
    with pytest.raises(UserError, match=message) as error:
        import_kuailive_m3(source, tmp_path / "out", 2)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["src"], "nothing half-written"


def test_missing_files(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        import_kuailive_m3(tmp_path / "nowhere", tmp_path / "out")
    for file in (source / "live_emb_128_ts").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"live_emb_128_ts: no \*\.parquet here"):
        import_kuailive_m3(source, tmp_path / "out")
    (source / "photo_play.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"no \*\.parquet here"):
        import_kuailive_m3(source, tmp_path / "out")
    (source / "photo_play.parquet").unlink()
    with pytest.raises(UserError, match=r"photo_play\.parquet: is missing"):
        import_kuailive_m3(source, tmp_path / "out")


def test_a_damaged_parquet_file_is_named(source: Path, tmp_path: Path) -> None:
    (source / "photo_play.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"photo_play\.parquet: cannot be read as a table"):
        import_kuailive_m3(source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["src"]
