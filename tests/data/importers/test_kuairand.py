"""Tests of the KuaiRand importer on small files with the pitfalls of the published layout, and on real data."""

import csv
import math
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.console.errors import UserError
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.format.text_schema import read_texts
from trainer.data.importers import columns, kuairand, table_files
from trainer.data.importers.kuairand import BEHAVIOURS, DURATION_EDGES_S, find_files, import_kuairand

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{number}" for number in range(18)) + "\n"
)
VIDEO_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag\n"
)
T0 = 1_651_334_400_000  # 1 May 2022, a Sunday, 00:00 in Shanghai

# user, video, time, click, like, ..., play, duration, profile and comment stay, profile_enter, rand, tab
APRIL = [
    f"5,20,20220501,100,{T0 + 3_600_000},1,0,0,0,0,0,1,9000,8000,0,0,0,0,1",
    f"5,10,20220501,0,{T0},1,1,0,0,0,0,0,4000,0,0,700,1,0,6",
    # The same exposure again with other values: the first line is kept.
    f"5,10,20220501,0,{T0},0,0,0,0,0,0,0,0,0,0,0,0,0,6",
    f"6,10,20220501,0,{T0},0,0,0,0,0,1,0,0,0,0,0,0,0,0",
]
MAY = [
    # date and hourmin are those of the next day and hour, the clock is time_ms.
    f"6,30,20220502,0,{T0 + 86_399_000},1,0,1,1,1,0,1,30000,20000,0,0,0,0,14",
    f"5,20,20220501,100,{T0 + 3_600_000},1,0,0,0,0,0,1,9000,8000,0,0,0,0,1",
]
RANDOM = [f"6,20,20220501,0,{T0 + 5000},0,0,0,0,0,0,0,100,8000,0,0,0,1,0"]
USERS = [
    '5,full_active,0,1,1,3,"(0,10]",0,0,2,"[1,5)",100,91-180,1,2,3,4,5.0,6,0,7,8,9,1,2,1.0,0.0,1.0,0.0,0.0,0.0',
    '6,UNKNOWN,0,-124,0,0,0,1500,"[1k,5k)",0,0,14,8-14,0,2,30,4,,6,0,7,80,9,1,2,,,,,,',
]
VIDEOS = [
    "10,1000,NORMAL,2022-04-10,LongImport,0.0,,720.0,1280.0,1,,",
    "20,2000,AD,2022-04-10,Web,0.0,8000.0,1280.0,720.0,2,9.0,39",
    '30,1000,UNKNOWN,2022-04-11,Web,0.0,20000.0,0.0,0.0,0,11.0,"12,39,7"',
]


def write_version(folder: Path, version: str = "27k") -> Path:
    """Write the files of one version to ``folder/data``; the logs of 27k are in parts."""
    data = folder / "data"
    data.mkdir(parents=True)
    april, may = ("_part1", "_part2") if version == "27k" else ("", "")
    (data / f"log_standard_4_08_to_4_21_{version}{april}.csv").write_text(LOG_HEADER + "\n".join(APRIL) + "\n")
    (data / f"log_standard_4_22_to_5_08_{version}{may}.csv").write_text(LOG_HEADER + "\n".join(MAY) + "\n")
    (data / f"log_random_4_22_to_5_08_{version}.csv").write_text(LOG_HEADER + "\n".join(RANDOM) + "\n")
    (data / f"user_features_{version}.csv").write_text(USER_HEADER + "\n".join(USERS) + "\n")
    (data / f"video_features_basic_{version}.csv").write_text(VIDEO_HEADER + "\n".join(VIDEOS) + "\n")
    return data


def rows_of(out: Path) -> tuple[DatasetSpec, dict[str, np.ndarray]]:
    """Return specification and rows of a dataset, in order of visit_id."""
    spec = DatasetSpec.load(out)
    rows = read_rows(str(out), spec)
    order = np.argsort(rows["visit_id"])
    return spec, {name: column[order] for name, column in rows.items()}


def side_of(spec: DatasetSpec, rows: dict[str, np.ndarray], name: str) -> list:
    """Return a side feature of all rows, decoded by its vocabulary if it has one."""
    codes = rows["side"][:, [side.name for side in spec.side].index(name)].tolist()
    words = spec.extra["vocabularies"].get("tag" if name.startswith("tag_") else name)
    return codes if words is None else [None if code == 0 else words[code - 1] for code in codes]


@pytest.mark.parametrize("version", ["pure", "1k", "27k"])
@pytest.mark.parametrize("inside", [False, True])
def test_published_layout(tmp_path: Path, version: str, inside: bool) -> None:
    data = write_version(tmp_path / "src", version)
    import_kuairand(data if inside else data.parent, tmp_path / "out", 3)
    spec, rows = rows_of(tmp_path / "out")
    assert spec.name == {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}[version]
    assert (spec.extra["log_rows"], spec.extra["duplicates_dropped"], spec.exposures, spec.rows) == (6, 2, 4, 4)
    assert (spec.extra["duplicate_lines"], spec.extra["conflicting_visits_dropped"]) == (1, 1)
    # Lines 3 of the first log and 2 of the second repeat (user, video, time): their first lines stay.
    assert rows["visit_id"].tolist() == [0, 1, 3, 4]
    assert rows["user_id"].tolist() == [5, 5, 6, 6]
    assert rows["item_id"].tolist() == [20, 10, 10, 30]
    assert rows["author_id"].tolist() == [2000, 1000, 1000, 1000]
    assert (rows["request_ms"] - T0).tolist() == [3_600_000, 0, 0, 86_399_000]
    assert (rows["emit_ms"] - rows["request_ms"]).tolist() == [9000, 4000, 0, 30000]
    assert (rows["domain"] == 0).all() and (rows["mask"] == 1).all()
    stays = read_texts(tmp_path / "out", "visits").to_pylist()
    assert {one["visit_id"]: one["staytime_ms"] for one in stays} == {0: 0, 1: 700, 3: 0, 4: 0}
    assert all(one["shown"] == one["shown_likes"] == one["interacted"] == [] for one in stays)
    texts = read_texts(tmp_path / "out", "items").to_pylist()
    assert [(one["item_id"], one["author_id"], one["duration_ms"], one["tag"], one["text"]) for one in texts] == [
        (10, 1000, 0, "", ""),
        (20, 2000, 8000, "39", ""),
        (30, 1000, 20_000, "12", ""),
    ]
    expected = [{"click", "long_view"}, {"click", "like", "profile_enter"}, {"hate"}]
    expected.append({"click", "long_view", "comment", "follow", "forward"})
    for label, names in zip(rows["label"], expected, strict=True):
        assert {name for name, happened in zip(BEHAVIOURS, label, strict=True) if happened} == names


def test_features(tmp_path: Path) -> None:
    import_kuairand(write_version(tmp_path / "src"), tmp_path / "out", 2)
    spec, rows = rows_of(tmp_path / "out")
    expected = {
        "user_active_degree": ["full_active", "full_active", None, None],
        "is_live_streamer": ["1", "1", None, None],
        "is_video_author": ["1", "1", "0", "0"],
        "follow_user_num_range": ["(0,10]", "(0,10]", "0", "0"],
        "onehot_feat2": ["3", "3", "30", "30"],
        "onehot_feat4": ["5", "5", None, None],
        "onehot_feat12": ["1", "1", None, None],
        "video_type": ["AD", "NORMAL", "NORMAL", None],
        "upload_type": ["Web", "LongImport", "LongImport", "Web"],
        "music_type": ["9", None, None, "11"],
        "tag_0": ["39", None, None, "12"],
        "tag_1": [None, None, None, "39"],
        "tab": [2, 7, 1, 15],
        "hour": [2, 1, 1, 24],
        "weekday": [7, 7, 7, 7],
        "duration_bucket": [np.searchsorted(DURATION_EDGES_S, 8) + 1, 0, 0, np.searchsorted(DURATION_EDGES_S, 20) + 1],
        "aspect_bucket": [6, 2, 2, 0],
    }
    for name, values in expected.items():
        assert side_of(spec, rows, name) == values, name
    assert spec.extra["vocabularies"]["tag"] == ["12", "39"], "of the first two tags, in numeric order"
    dense = dict(zip([feature.name for feature in spec.dense], rows["dense"].T, strict=True))
    np.testing.assert_allclose(dense["log_duration"], np.log1p([8, 0, 0, 20]), rtol=1e-6)
    np.testing.assert_allclose(dense["log_fans_user_num"], np.log1p([0, 0, 1500, 1500]), rtol=1e-6)
    np.testing.assert_allclose(dense["log_register_days"], np.log1p([100, 100, 14, 14]), rtol=1e-6)
    # 1:00, 0:00 and, a second before midnight, close to 0:00 again.
    np.testing.assert_allclose(dense["day_sin"], [math.sin(math.pi / 12), 0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(dense["day_cos"], [math.cos(math.pi / 12), 1, 1, 1], atol=1e-4)
    # What is only known afterwards is no feature.
    names = {feature.name for feature in (*spec.side, *spec.dense)}
    assert not any("play" in name or "stay" in name or name in BEHAVIOURS for name in names)


def test_histories_and_events_have_the_documented_times(tmp_path: Path) -> None:
    import_kuairand(write_version(tmp_path / "src"), tmp_path / "out", 1)
    spec = DatasetSpec.load(tmp_path / "out")
    events = pq.read_table(tmp_path / "out" / "events" / "part-00000.parquet").to_pylist()
    seen = [(event["event"], event["time_ms"] - T0) for event in events if event["visit_id"] == 1]
    assert sorted(seen) == [
        ("click", 0),
        ("enter", 0),
        ("exit", 4000),
        ("exposure", 0),
        ("like", 4000),
        ("profile_enter", 4000),
    ]
    history = Histories(tmp_path / "out", spec)
    known = [
        history.latest(np.array([5]), np.array([T0 + at]), domain=0, length=9).item_id.tolist()
        for at in (4000, 4001, 3_609_000, 3_609_001)
    ]
    assert known == [[], [10], [10], [10, 20]]


def test_random_exposures_on_request_can_be_told_apart(tmp_path: Path) -> None:
    import_kuairand(write_version(tmp_path / "src"), tmp_path / "out", 1, random=True)
    spec, rows = rows_of(tmp_path / "out")
    assert rows["visit_id"].tolist() == [0, 1, 3, 4, 6]
    assert side_of(spec, rows, "is_rand") == [1, 1, 1, 1, 2]


def test_blocks_and_partitions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_version(tmp_path / "src")
    import_kuairand(src, tmp_path / "whole", 1)
    with monkeypatch.context() as patch:
        whole = table_files.read_batches
        patch.setattr(
            columns,
            "read_batches",
            lambda file, types, multiline: whole(file, types, block_bytes=1 << 9, multiline=multiline),
        )
        patch.setattr(kuairand, "_ITEMS_AT_ONCE", 1)
        import_kuairand(src, tmp_path / "blocks", 4)
    one, other = rows_of(tmp_path / "whole")[1], rows_of(tmp_path / "blocks")[1]
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def spoil(data: Path, name: str, old: str, new: str) -> None:
    file = next(data.glob(name))
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("log_standard_4_08*", ",700,1,0,6", ",-700,1,0,6", r"row 2: column 'comment_stay_time' is -700; .* 0 or more"),
        ("log_standard_4_08*", "is_like", "liked", r"log_standard_4_08\S+: column 'is_like' is missing"),
        ("log_standard_4_08*", f"{T0},1,1", "noon,1,1", r"log_standard_4_08\S+: row 2: column 'time_ms' is 'noon'"),
        ("log_standard_4_08*", f"{T0},1,1", ",1,1", r"log_standard_4_08\S+: row 2: column 'time_ms' is empty"),
        ("log_standard_4_08*", "0,700,1,0,6", "0,700", r"log_standard_4_08\S+: line 3: "),
        (
            "log_standard_4_22*",
            "6,30,",
            "6,31,",
            r"log_standard_4_22\S+: row 1: column 'video_id' is 31; .*video_features_basic_27k\.csv, which",
        ),
        (
            "log_standard_4_08*",
            "5,20,",
            "-5,20,",
            r"log_standard_4_08\S+: row 1: column 'user_id' is -5; it must be a whole",
        ),
        ("user*", "onehot_feat3,", "", r"user_features_27k\.csv: column 'onehot_feat3' is missing"),
        ("video*", "8000.0", "8 s", r"video_features_basic_27k\.csv: row 2: column 'video_duration' is '8 s'"),
        (
            "video*",
            "20,2000",
            "10,2000",
            r"video_features_basic_27k\.csv: row 2: column 'video_id' is 10; .* only once",
        ),
        (
            "video*",
            "20,2000",
            "20,",
            r"video_features_basic_27k\.csv: row 2: column 'author_id' is empty; it must be the author of video 20",
        ),
        ("video*", "20,2000", "20,NULL", r"video_features_basic_27k\.csv: row 2: column 'author_id' is empty"),
        ("user*", "\n6,", "\n5,", r"user_features_27k\.csv: row 2: column 'user_id' is 5; .* only once"),
        (
            "user*",
            "5,full_active,0,1,1,3,",
            "5,full_active,0,1,1,inf,",
            r"27k\.csv: row 1: column 'follow_user_num' is inf",
        ),
        ("log_standard_4_08*", ",9000,", ",2147483648,", r"08\S+: row 1: column 'play_time_ms' is 2147483648; it"),
    ],
)
def test_mistakes_name_file_row_and_column(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    data = write_version(tmp_path / "src")
    spoil(data, name, old, new)
    with pytest.raises(UserError, match=message) as error:
        import_kuairand(data, tmp_path / "out", 2)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["src"], "nothing half-written"


def test_missing_and_mixed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no log_standard_\*\.csv here or in data/"):
        find_files(tmp_path)
    data = write_version(tmp_path / "src", "1k")
    assert [file.name for file in find_files(data, random=True).logs] == [
        "log_standard_4_08_to_4_21_1k.csv",
        "log_standard_4_22_to_5_08_1k.csv",
        "log_random_4_22_to_5_08_1k.csv",
    ]
    (data / "log_random_4_22_to_5_08_1k.csv").unlink()
    with pytest.raises(UserError, match=r"log_random_\*_1k\.csv is missing"):
        find_files(data, random=True)
    (data / "user_features_1k.csv").rename(data / "user_features_pure.csv")
    with pytest.raises(UserError, match=r"user_features_1k\.csv: is missing"):
        find_files(data)
    (data / "log_standard_4_08_to_4_21_1k.csv").rename(data / "log_standard_4_08_to_4_21_pure.csv")
    with pytest.raises(UserError, match=r"one version .* found \['1k', 'pure'\]"):
        find_files(data)


def test_real_log(tmp_path: Path, real_kuairand: Path) -> None:
    """Test every row against the published files, read line by line."""
    src = real_kuairand
    files = find_files(src)
    with open(files.videos, newline="") as file:
        videos = {line["video_id"]: line for line in csv.DictReader(file)}
    expected: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    lines = []
    for log in files.logs:
        with open(log, newline="") as file:
            lines += list(csv.DictReader(file))
    for number, line in enumerate(lines):
        expected.setdefault((line["user_id"], line["video_id"], line["time_ms"]), (number, line))
    spec = import_kuairand(src, tmp_path / "out", 4)
    if len(lines) == 185_177:
        assert len(expected) == 180_129
    assert (spec.extra["log_rows"], spec.rows) == (len(lines), len(expected))
    rows = rows_of(tmp_path / "out")[1]
    column = {
        name: np.array([int(line[name]) for _, line in expected.values()])
        for name in ("user_id", "video_id", "time_ms", "play_time_ms", "tab", *BEHAVIOURS.values())
    }
    own = [videos[line["video_id"]] for _, line in expected.values()]
    assert rows["visit_id"].tolist() == [number for number, _ in expected.values()]
    assert rows["author_id"].tolist() == [int(video["author_id"]) for video in own]
    np.testing.assert_array_equal(rows["user_id"], column["user_id"])
    np.testing.assert_array_equal(rows["item_id"], column["video_id"])
    np.testing.assert_array_equal(rows["request_ms"], column["time_ms"])
    np.testing.assert_array_equal(rows["emit_ms"], column["time_ms"] + column["play_time_ms"])
    for place, name in enumerate(BEHAVIOURS.values()):
        np.testing.assert_array_equal(rows["label"][:, place], column[name])
    assert [tag or "" for tag in side_of(spec, rows, "tag_0")] == [video["tag"].split(",")[0] for video in own]
    assert side_of(spec, rows, "tab") == (column["tab"] + 1).tolist()
    zone = ZoneInfo("Asia/Shanghai")
    clock = [datetime.fromtimestamp(moment / 1000, zone) for moment in column["time_ms"].tolist()]
    assert side_of(spec, rows, "hour") == [moment.hour + 1 for moment in clock]
    assert side_of(spec, rows, "weekday") == [moment.isoweekday() for moment in clock]


@pytest.mark.parametrize("wrong", ["0", "1651334400", "1651334400000000", "4102444800000"])
def test_a_time_of_another_unit_is_refused(tmp_path: Path, wrong: str) -> None:
    data = write_version(tmp_path / "src", "pure")
    log = data / "log_standard_4_22_to_5_08_pure.csv"
    log.write_text(log.read_text().replace(str(T0 + 3_600_000), wrong))
    with pytest.raises(UserError, match=rf"log_standard_4_22_to_5_08_pure.csv: row 2: column 'time_ms' is {wrong}; it"):
        import_kuairand(data, tmp_path / "out", 2)
