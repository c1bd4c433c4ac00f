"""Tests of the KuaiLive importer on small files in the published layout, with its pitfalls."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.importers import columns, table_files
from trainer.data.importers.kuailive import BEHAVIOURS, import_kuailive

ONEHOT = ",".join(f"onehot_feat{number}" for number in range(7))
T0 = 1_746_374_400_000  # 5 May 2025, 00:00 in Shanghai, a Monday
DAY = 86_400_000

STREAMERS = [
    "streamer_id,gender,age,country,device_brand,device_price,live_operation_tag,fans_user_num,fans_group_fans_num,"
    "follow_user_num,first_live_timestamp,accu_live_cnt,accu_live_duration,accu_play_cnt,accu_play_duration,"
    f"reg_timestamp,{ONEHOT}",
    "900,M,24-30,China,APPLE,5000+,Relationship,0-10,0-10,0-10,2025-05-04,0-10,0-10,0-10,0-10,2014-07-03,1,0,0,0,0,0,0",
    "901,F,31-40,China,XIAOMI,1000,,0-10,0-10,0-10,2025-05-06,0-10,0-10,0-10,0-10,2025-05-03,0,1,0,0,0,0,1",
]
USERS = [
    "user_id,age,gender,country,device_brand,device_price,reg_timestamp,fans_num,follow_num,first_watch_live_timestamp,"
    f"accu_watch_live_cnt,accu_watch_live_duration,is_live_streamer,is_photo_author,{ONEHOT}",
    "5,18-23,M,China,DESKTOP,0,2025-04-25,0-10,10-100,2025-05-05,0-50000,0-1000000000,0,1,1,0,0,0,0,0,0",
    "6,24-30,F,China,APPLE,5000+,,0-10,10-100,,0-50000,0-1000000000,1,0,0,0,0,0,0,0,1",
]
ROOMS = [
    "p_date,live_id,streamer_id,live_type,start_timestamp,end_timestamp,live_content_category,live_name_id",
    f"20250505,70,900,1,{T0 - 60_000},{T0 + DAY},shop,1",
    f"20250505,71,901,2,{T0 + 100_000},{T0 + DAY + 5},game,0",
    # The room went on after midnight: its line comes again, with other words.
    f"20250506,71,901,1,{T0 + 200_000},{T0 + DAY + 9},shop,1",
    f"20250505,72,900,1,{T0 + 7},{T0 + 8},shop,9",
]
CLICKS = [
    "user_id,live_id,streamer_id,timestamp,watch_live_time",
    f"6,71,901,{T0 + DAY + 500},60000",
    f"5,70,900,{T0 + 1_000},2852",
    f"5,70,900,{T0 + 20_000},15000",
    # The same click with other values: the first line is kept.
    f"5,70,900,{T0 + 20_000},1",
]
NEGATIVES = [
    "user_id,live_id,streamer_id,timestamp",
    f"6,70,900,{T0 + 2_000}",
    f"6,72,900,{T0 + 3_000}",
    # Shown and clicked in one millisecond: the click stays.
    f"5,70,900,{T0 + 1_000}",
]
LIKES = [
    "user_id,live_id,streamer_id,timestamp",
    f"5,70,900,{T0 + 21_500}",
    f"5,70,900,{T0 + 1_500}",
    f"5,70,900,{T0 + 21_000}",
    # Before any click, and of somebody who was only shown the room.
    f"5,70,900,{T0 + 999}",
    f"6,70,900,{T0 + 2_500}",
]
COMMENTS = ["user_id,live_id,streamer_id,timestamp", f"6,71,901,{T0 + DAY + 99_000}"]
GIFTS = ["user_id,live_id,streamer_id,timestamp,gift_price", f"5,70,900,{T0 + 30_000},20", f"5,70,900,{T0 + 31_000},5"]
FILES = {
    "streamer": STREAMERS,
    "user": USERS,
    "room": ROOMS,
    "click": CLICKS,
    "negative": NEGATIVES,
    "like": LIKES,
    "comment": COMMENTS,
    "gift": GIFTS,
}
TITLES = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)


def write_source(folder: Path) -> Path:
    folder.mkdir()
    for name, lines in FILES.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    np.save(folder / "title_embeddings.npy", TITLES)
    return folder


def rows_of(out: Path) -> tuple[DatasetSpec, dict[str, np.ndarray]]:
    spec = DatasetSpec.load(out)
    rows = read_rows(str(out), spec)
    order = np.argsort(rows["visit_id"])
    return spec, {name: column[order] for name, column in rows.items()}


def side_of(spec: DatasetSpec, rows: dict[str, np.ndarray], name: str) -> list:
    codes = rows["side"][:, [side.name for side in spec.side].index(name)].tolist()
    words = spec.extra["vocabularies"].get(name)
    return codes if words is None else [None if code == 0 else words[code - 1] for code in codes]


def test_exposures_and_their_behaviours(tmp_path: Path) -> None:
    import_kuailive(write_source(tmp_path / "src"), tmp_path / "out", 3)
    spec, rows = rows_of(tmp_path / "out")
    assert (spec.name, spec.rows, spec.exposures) == ("KuaiLive", 5, 5)
    assert {name: spec.extra[name] for name in ("log_rows", "duplicates_dropped", "orphans_dropped")} == {
        "log_rows": 7,
        "duplicates_dropped": 2,
        "orphans_dropped": 2,
    }
    assert "non" not in spec.licence and "NC" in spec.licence and "zenodo.org/records/16565801" in spec.source
    assert rows["visit_id"].tolist() == [0, 1, 2, 4, 5]
    assert rows["user_id"].tolist() == [6, 5, 5, 6, 6]
    assert rows["item_id"].tolist() == [71, 70, 70, 70, 72]
    assert rows["author_id"].tolist() == [901, 900, 900, 900, 900]
    assert (rows["request_ms"] - T0).tolist() == [DAY + 500, 1_000, 20_000, 2_000, 3_000]
    happened = [
        {name for name, label in zip(BEHAVIOURS, labels, strict=True) if label} for labels in rows["label"].tolist()
    ]
    assert happened == [
        {"click", "effective_view", "long_view", "comment"},
        {"click", "like"},
        {"click", "effective_view", "like", "gift"},
        set(),
        set(),
    ]
    # Labels are complete when the watch has ended and the last of its events has happened.
    assert (rows["emit_ms"] - T0).tolist() == [DAY + 99_000, 3_852, 35_000, 2_000, 3_000]


def test_events_have_their_own_times(tmp_path: Path) -> None:
    import_kuailive(write_source(tmp_path / "src"), tmp_path / "out", 1)
    events = pq.read_table(tmp_path / "out" / "events" / "part-00000.parquet").to_pylist()
    own_events = [(event["event"], event["time_ms"] - T0, event["value"]) for event in events if event["visit_id"] == 2]
    assert own_events == [
        ("exposure", 20_000, 0),
        ("enter", 20_000, 0),
        ("click", 20_000, 0),
        ("like", 21_000, 0),
        ("like", 21_500, 0),
        ("gift", 30_000, 20),
        ("gift", 31_000, 5),
        ("effective_view", 35_000, 0),
        ("exit", 35_000, 15_000),
    ]


def test_features_are_as_of_the_request(tmp_path: Path) -> None:
    import_kuailive(write_source(tmp_path / "src"), tmp_path / "out", 2)
    spec, rows = rows_of(tmp_path / "out")
    assert side_of(spec, rows, "user_age") == ["24-30", "18-23", "18-23", "24-30", "24-30"]
    assert side_of(spec, rows, "is_photo_author") == ["0", "1", "1", "0", "0"]
    assert side_of(spec, rows, "live_operation_tag") == [None, *["Relationship"] * 4]
    assert side_of(spec, rows, "content_category") == ["game", "shop", "shop", "shop", "shop"]
    assert side_of(spec, rows, "live_type") == ["2", "1", "1", "1", "1"]
    assert side_of(spec, rows, "hour") == [1] * 5 and side_of(spec, rows, "weekday") == [2, 1, 1, 1, 1]
    dense = dict(zip([feature.name for feature in spec.dense], np.expm1(rows["dense"].T), strict=True))
    np.testing.assert_allclose(dense["log_room_age_s"], [DAY / 1000 - 99.5, 61, 80, 62, 2.993], rtol=1e-5)
    # A date counts from the day after: user 5 first watches and streamer 901 first shows on the day of the request.
    np.testing.assert_allclose(dense["log_user_days"], [0, 10, 10, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(dense["log_user_live_days"], [0] * 5, rtol=1e-5)
    np.testing.assert_allclose(dense["log_author_live_days"], [0, 1, 1, 1, 1], rtol=1e-5)
    assert math.isclose(dense["log_author_days"][0], 3, rel_tol=1e-5)
    names = {feature.name for feature in (*spec.side, *spec.dense)}
    assert not any(word in name for name in names for word in ("accu", "fans", "follow", "end_", "watch", "cnt"))
    assert "end_timestamp" not in pq.read_schema(tmp_path / "out" / "items.parquet").names


def test_histories_keep_the_category(tmp_path: Path) -> None:
    import_kuailive(write_source(tmp_path / "src"), tmp_path / "out", 1)
    spec = DatasetSpec.load(tmp_path / "out")
    history = Histories(tmp_path / "out", spec)
    for at, expected in ((3_852, []), (3_853, [70]), (35_001, [70, 70])):
        found = history.latest(np.array([5]), np.array([T0 + at]), domain=1, length=9)
        assert found.item_id.tolist() == expected
        assert [spec.extra["vocabularies"]["content_category"][code - 1] for code in found.tag] == ["shop"] * len(
            expected
        )


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_title_vectors_become_those_of_the_rooms(tmp_path: Path, suffix: str) -> None:
    source = write_source(tmp_path / "src")
    if suffix == "npz":
        (source / "title_embeddings.npy").unlink()
        np.savez(source / "title_embeddings.npz", vectors=TITLES)
    spec = import_kuailive(source, tmp_path / "out", 2)
    table = ContentVectors.open(tmp_path / "out" / "embeddings" / "items")
    # Room 72 names a title that the file lacks.
    assert table.ids.tolist() == [70, 71] and spec.extra["items_without_embedding"] == 1
    np.testing.assert_allclose(table.vectors, TITLES[[1, 0]], atol=2e-3)


def test_order_blocks_and_partitions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "src")
    import_kuailive(source, tmp_path / "whole", 1)
    for name in ("like", "gift", "user", "streamer"):
        header, *lines = FILES[name]
        (source / f"{name}.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    with monkeypatch.context() as patch:
        whole = table_files.read_batches
        patch.setattr(
            columns,
            "read_batches",
            lambda file, types, multiline: whole(file, types, block_bytes=1 << 9, multiline=multiline),
        )
        import_kuailive(source, tmp_path / "blocks", 4)
    one, other = rows_of(tmp_path / "whole")[1], rows_of(tmp_path / "blocks")[1]
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_older_names_of_columns(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    import_kuailive(source, tmp_path / "new", 1)
    for file in source.glob("*.csv"):
        text = file.read_text().replace("streamer_id", "author_id").replace("is_live_streamer", "is_live_author")
        file.write_text(text.replace("is_photo_author", "is_video_author"))
    import_kuailive(source, tmp_path / "old", 1)
    one, other = rows_of(tmp_path / "new")[1], rows_of(tmp_path / "old")[1]
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "click",
            ",",
            ";",
            r"click\.csv: column 'user_id' is missing; .* \(separated by ';'\? it must be a comma or a tab\)",
        ),
        ("click", "watch_live_time", "watched", r"click\.csv: column 'watch_live_time' is missing"),
        ("click", "60000", "a minute", r"click\.csv: row 1: column 'watch_live_time' is 'a minute'"),
        ("click", "2852", "-2852", r"click\.csv: row 2: column 'watch_live_time' is -2852.0; it must be milliseconds"),
        ("click", f"{T0 + 1_000}", "", r"click\.csv: row 2: column 'timestamp' is empty; it must be a time"),
        (
            "like",
            f"{T0 + 1_500}",
            f"{T0 // 1000}",
            r"like\.csv: row 2: column 'timestamp' is 1746374400; it must be a time",
        ),
        ("negative", "6,72,900,", "6,72,", r"negative\.csv: line 3: "),
        ("room", "70,900", "x,900", r"room\.csv: row 1: column 'live_id' is 'x'"),
        (
            "user",
            "\n6,24",
            "\n5,24",
            r"user\.csv: row 2: column 'user_id' is 5; it must be an id that occurs only once",
        ),
        ("streamer", "\n901,", "\n900,", r"streamer\.csv: row 2: column 'streamer_id' is 900"),
        ("user", "2025-04-25", "25.4.2025", r"user\.csv: row 1: column 'reg_timestamp' is '25\.4\.2025'"),
        ("gift", "gift_price", "price", r"gift\.csv: column 'gift_price' is missing"),
    ],
)
def test_mistakes_name_file_row_and_column(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    source = write_source(tmp_path / "src")
    file = source / f"{name}.csv"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, -1 if old == "," else 1))
    with pytest.raises(UserError, match=message) as error:
        import_kuailive(source, tmp_path / "out", 2)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["src"], "nothing half-written"


def test_missing_files_and_bad_titles(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        import_kuailive(tmp_path / "nowhere", tmp_path / "out")
    source = write_source(tmp_path / "src")
    for bad, message in (
        (TITLES[0], r"is an array \(128,\) of float32"),
        (np.where(np.arange(2)[:, None] == 1, np.nan, TITLES), r"row 1 \(from 0\) has a number that is not finite"),
    ):
        np.save(source / "title_embeddings.npy", bad)
        with pytest.raises(UserError, match=message):
            import_kuailive(source, tmp_path / "out")
    (source / "title_embeddings.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="cannot be read as an array"):
        import_kuailive(source, tmp_path / "out")
    (source / "title_embeddings.npy").unlink()
    with pytest.raises(UserError, match=r"title_embeddings\.npy: is missing"):
        import_kuailive(source, tmp_path / "out")
    (source / "gift.csv").unlink()
    with pytest.raises(UserError, match=r"gift\.csv: is missing"):
        import_kuailive(source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["src"]
