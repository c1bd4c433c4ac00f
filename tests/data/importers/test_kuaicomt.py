"""Tests of the KuaiComt importer on small files with both delimiters, both sets of names and both units of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from launch.cli.main import main
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.format.text_schema import read_texts
from trainer.data.importers.daily_top_comments import SHOWN, DailyTopComments, rank_in_runs
from trainer.data.importers.kuaicomt import BEHAVIOURS, import_kuaicomt

DAY_MS = 86_400_000
T0 = 1_696_089_600_000  # 1 October 2023, a Sunday, 00:00 in Shanghai

VISIT_COLUMNS = [
    "user_id", "video_id", "p_hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward",
    "is_collect", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time",
]  # fmt: skip
TOUCH_COLUMNS = ["user_id", "comment_id", "time_stamp", "photo_id", "is_like", "is_reply"]
USER_COLUMNS = [
    "user_id", "user_active_degree", "is_live_author", "produce_video_num", "follow_count", "follow_user_num_range",
    "fans_count", "fans_user_num_range", "friend_user_num_range", "register_days",
    *(f"onehot_feat{number}" for number in range(21)),
]  # fmt: skip
VIDEO_COLUMNS = ["video_id", "author_id", "video_type", "upload_dt", "caption", "duration", "category"]
COMMENT_COLUMNS = [
    "comment_id", "comment_content", "video_id", "comment_like_cnt", "comment_reply_out", "show_comment_cnt_td",
]  # fmt: skip

Lines = list[list[Any]]


def visit(user: int, video: int, time_ms: float, play: float = 0.0, stay: int = 0, **happened: int) -> list[Any]:
    flags = [happened.get(name, 0) for name in VISIT_COLUMNS[4:12]]
    return [user, video, 0, time_ms, *flags, play, 20_000.0, 0, stay]


VISITS: Lines = [
    visit(5, 10, T0 + 1000.0, 4000.0, 2500, is_click=1, is_collect=1),
    # the same exposure again with other values: the first line is kept
    visit(5, 10, T0 + 1000.0, 9000.0, 9900),
    visit(6, 10, T0 + 500.0, 30_000.0, 0, is_click=1, long_view=1),
    visit(5, 20, T0 + 5000.0, 100.0, 800),
    visit(5, 10, T0 + DAY_MS, 0.0, 1500),
    visit(6, 10, T0 + 2 * DAY_MS, 0.0, 0),
]
TOUCHES: Lines = [
    # in the second in which the visit began
    [5, 102, T0 // 1000 + 1, 10, 1, 0],
    [5, 102, T0 // 1000 + 3, 10, 0, 1],
    [5, 101, (T0 + DAY_MS) // 1000 + 1, 10, 1, 0],
    [6, 101, T0 // 1000 + 9, 10, 1, 1],
    # neither liked nor answered
    [6, 103, T0 // 1000 + 9, 10, 0, 0],
    # before any visit
    [6, 201, T0 // 1000 - 60, 20, 1, 0],
]
USERS: Lines = [
    [5, "full_active", 0, 1, 1, "(0,10]", 3, "[1,10)", "0", 99, *range(21)],
    [6, "UNKNOWN", 1, 0, 0, "0", 0, "0", "0", 0, *([0] * 21)],
]
VIDEOS: Lines = [
    [10, 1000, "NORMAL", "2023-09-30", '没有遗憾#张睿, "quoted"', 19_960.0, "明星"],
    [20, 2000, "AD", "2023-09-30", "two\rlines", 8000.0, ""],
]
COMMENTS: Lines = [
    [103, "first", 10, 4, 0, 9],
    [101, "乱了[捂脸]", 10, 112, 6, 645],
    [102, "hm, well", 10, 0, 0, 1],
    [201, "", 20, 3, 0, 1],
]


def write(folder: Path, *, delimiter: str = ",", released: bool = False, milliseconds: bool = False) -> Path:
    """Write the five files.

    ``released`` takes the names of the authors' code, ``milliseconds`` writes interaction times in milliseconds.
    """
    folder.mkdir(parents=True)
    touches = [[*line[:2], line[2] * 1000 if milliseconds else line[2], *line[3:]] for line in TOUCHES]
    swap = {"video_id": "photo_id", "video_type": "photo_type"} if released else {}
    files = {
        "user_photo_final_filtered_table.csv" if released else "user_video_inter.csv": (VISIT_COLUMNS, VISITS),
        "user_comment_inter.csv": (TOUCH_COLUMNS, touches),
        "user_table_final.csv" if released else "user_features.csv": (USER_COLUMNS, USERS),
        "photo_table_final.csv" if released else "video_features.csv": (VIDEO_COLUMNS, VIDEOS),
        "comment_features.csv": (COMMENT_COLUMNS, COMMENTS),
    }
    for name, (columns, lines) in files.items():
        text = delimiter.join(swap.get(column, column) for column in columns) + "\n"
        for line in lines:
            text += delimiter.join(quoted(value, delimiter) for value in line) + "\n"
        (folder / name).write_bytes(text.encode())
    return folder


def quoted(value: object, delimiter: str) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if delimiter in text or '"' in text else text


def replaced(file: Path, old: str, new: str) -> None:
    content = file.read_bytes()
    assert old.encode() in content
    file.write_bytes(content.replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize(
    "layout",
    [{}, {"delimiter": "\t"}, {"delimiter": "\t", "released": True}, {"milliseconds": True}],
    ids=["published", "tabs", "released", "milliseconds"],
)
def test_every_layout_gives_the_same_dataset(tmp_path: Path, layout: dict[str, Any]) -> None:
    import_kuaicomt(write(tmp_path / "src", **layout), tmp_path / "out", 3)
    spec = DatasetSpec.load(tmp_path / "out")
    assert (spec.exposures, spec.rows, spec.extra["duplicates_dropped"], spec.extra["orphans_dropped"]) == (5, 5, 1, 1)
    assert (spec.extra["duplicate_lines"], spec.extra["conflicting_visits_dropped"]) == (0, 1)
    rows = read_rows(str(tmp_path / "out"), spec)
    order = np.argsort(rows["visit_id"])
    rows = {name: column[order] for name, column in rows.items()}
    assert rows["visit_id"].tolist() == [0, 2, 3, 4, 5]
    assert rows["author_id"].tolist() == [1000, 1000, 2000, 1000, 1000]
    assert (rows["emit_ms"] - rows["request_ms"]).tolist() == [4000, 30_000, 100, 0, 0]
    happened = [{name for name, label in zip(BEHAVIOURS, row, strict=True) if label} for row in rows["label"]]
    assert happened == [{"click", "collect"}, {"click", "long_view"}, set(), set(), set()]

    visits = {visit["visit_id"]: visit for visit in read_texts(tmp_path / "out", "visits").to_pylist()}
    assert {one: visit["staytime_ms"] for one, visit in visits.items()} == {0: 2500, 2: 0, 3: 800, 4: 1500, 5: 0}
    assert {one: visit["interacted"] for one, visit in visits.items()} == {0: [102], 2: [101], 3: [], 4: [101], 5: []}
    # before the first day nobody had touched a comment: they stand by id; then 102 twice, 101 once; then both twice
    assert [visits[one]["shown"] for one in (0, 2, 4, 5)] == [[101, 102, 103]] * 2 + [[102, 101, 103], [101, 102, 103]]
    assert [visits[one]["shown_likes"] for one in (0, 4, 5)] == [[0, 0, 0], [2, 1, 0], [2, 2, 0]]
    assert visits[3]["shown"] == [201]

    comments = read_texts(tmp_path / "out", "comments")
    assert comments.column("text").to_pylist() == ["first", "乱了[捂脸]", "hm, well", ""]
    assert comments.column("likes").to_pylist() == [4, 112, 0, 3]
    items = read_texts(tmp_path / "out", "items")
    assert items.column("text").to_pylist() == ['没有遗憾#张睿, "quoted"', "two lines"]
    assert items.column("tag").to_pylist() == ["明星", ""] and items.column("duration_ms").to_pylist() == [19_960, 8000]
    users = pq.read_table(tmp_path / "out/users.parquet")
    known = spec.extra["vocabularies"]
    codes = users.column("user_active_degree").to_pylist()
    assert [None if code == 0 else known["user_active_degree"][code - 1] for code in codes] == ["full_active", None]
    np.testing.assert_allclose(users.column("log_register_days").to_numpy(), np.log1p([99, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "user_video_inter.csv",
            ",2500\n",
            ",-2500\n",
            r"row 1: column 'comment_stay_time' is '-2500'; .* milliseconds",
        ),
        (
            "user_video_inter.csv",
            "6,10,0",
            "6,11,0",
            r"row 3: column 'video_id' is 11; .* a video that is listed in video_features.csv",
        ),
        ("user_video_inter.csv", str(T0 + 500.0), "77", r"row 3: column 'time_ms' is '77'; .* seconds since 1970"),
        ("user_video_inter.csv", "comment_stay_time", "stay", r"column 'comment_stay_time' is missing"),
        ("comment_features.csv", "102,", "101,", r"row 3: column 'comment_id' is 101; .* occurs only once"),
        ("comment_features.csv", ",112,", ",-112,", r"row 2: column 'comment_like_cnt' is '-112'; .* 0 or more"),
        ("comment_features.csv", ",112,", ",1e300,", r"row 2: column 'comment_like_cnt' is '1e300'; .* below 2\^53"),
        ("comment_features.csv", ",112,", ",1.5,", r"row 2: column 'comment_like_cnt' is '1.5'; .*a whole number"),
        ("user_comment_inter.csv", "5,102", "5,201", r"row 1: column 'comment_id' is 201; .* comment_features.csv"),
        ("video_features.csv", "\n20,", "\n10,", r"row 2: column 'video_id' is 10; .* occurs only once"),
        ("user_features.csv", "\n6,", "\n5,", r"row 2: column 'user_id' is 5; .* occurs only once"),
    ],
)
def test_bad_values_name_file_row_and_column(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    src = write(tmp_path / "src")
    replaced(src / file, old, new)
    with pytest.raises(UserError, match=rf"{file}: {message}"):
        import_kuaicomt(src, tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_missing_file_or_log_is_named(tmp_path: Path) -> None:
    src = write(tmp_path / "src")
    (src / "user_video_inter.csv").write_text(",".join(VISIT_COLUMNS) + "\n")
    with pytest.raises(UserError, match="no lines below its header"):
        import_kuaicomt(src, tmp_path / "out")
    (src / "comment_features.csv").unlink()
    with pytest.raises(UserError, match=r"comment_features\.csv: is missing"):
        import_kuaicomt(src, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        import_kuaicomt(tmp_path / "nowhere", tmp_path / "out")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write(tmp_path / "src")
    assert main(["data", "import", "kuaicomt", str(src), str(tmp_path / "out"), "--partitions", "2"]) == 0
    assert "5 training rows of 2 users in 2 partitions" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_daily_lists_are_those_of_a_plain_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    comment = rng.permutation(500)[:300]
    item = rng.integers(0, 12, 300)
    touched, day = rng.choice(comment[:40], 200), rng.integers(1, 8, 200)
    top_comments = DailyTopComments(comment, item, touched, day, first_day=3, last_day=6)
    for video in range(-1, 14):
        for today in range(3, 7):
            expected_order = [
                (-int(((touched == one) & (day < today)).sum()), int(one)) for one in comment[item == video].tolist()
            ]
            expected = sorted(expected_order)[:SHOWN]
            shown, counts = (values[0] for values in top_comments.lookup(np.array([video]), np.array([today])))
            assert shown[shown >= 0].tolist() == [one for _, one in expected]
            assert counts[shown >= 0].tolist() == [-count for count, _ in expected]


def test_rank_in_runs() -> None:
    assert rank_in_runs(np.array([4, 4, 4, 2, 7, 7])).tolist() == [0, 1, 2, 0, 0, 1]
    assert rank_in_runs(np.empty(0, np.int64)).tolist() == []
