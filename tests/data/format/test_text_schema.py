"""Text tables of a dataset: written, read back, and refused if a value is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.small_visits import SPEC, make_tables, make_visits
from trainer.console.errors import UserError
from trainer.data.format import text_schema
from trainer.data.format.text_schema import SCHEMAS, flat_lists, list_column, pad_lists, read_texts
from trainer.data.writing.builder import DatasetBuilder
from trainer.data.writing.text_writer import TextWriter, checked

COMMENTS: dict[str, Any] = {
    "comment_id": [7, 5, 9],
    "item_id": [1, 1, 2],
    "user_id": [3, -1, 4],
    "time_ms": [100, -1, 0],
    "likes": [0, 8, 2],
    "text": ["good", "", "没有遗憾"],
}
VISITS: dict[str, Any] = {
    "visit_id": [11, 10],
    "user_id": [3, 4],
    "item_id": [1, 2],
    "request_ms": [2_000, 1_000],
    "staytime_ms": [0, 4_500],
    "shown": [[5, 7], [9]],
    "shown_likes": [[8, 0], []],
    "interacted": [[], [9]],
}


def table(name: str, columns: dict[str, Any], **changed: Any) -> pa.Table:
    schema = SCHEMAS[name]
    return pa.table({**columns, **changed}, schema=pa.schema([schema.field(column) for column in columns]))


def write(path: Path, comments: pa.Table, visits: pa.Table) -> None:
    writer = TextWriter(path)
    writer.add("comments", comments)
    writer.add("visits", visits)
    writer.finish()


def test_what_was_written_is_read_and_visits_come_in_order_of_time(tmp_path: Path) -> None:
    write(tmp_path, table("comments", COMMENTS), table("visits", VISITS))
    assert read_texts(tmp_path, "comments").to_pydict() == COMMENTS
    assert read_texts(tmp_path, "visits").column("visit_id").to_pylist() == [10, 11]
    assert read_texts(tmp_path, "visits", ["shown"]).to_pydict() == {"shown": [[9], [5, 7]]}
    assert text_schema.has_texts(tmp_path, "visits") and not text_schema.has_texts(tmp_path, "items")


def test_tables_come_in_parts_and_columns_in_any_order(tmp_path: Path) -> None:
    whole = table("comments", COMMENTS).select(list(reversed(COMMENTS)))
    writer = TextWriter(tmp_path)
    writer.add("comments", whole.slice(0, 1))
    writer.add("comments", whole.slice(1))
    writer.finish()
    assert read_texts(tmp_path, "comments").to_pydict() == COMMENTS


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("comments", {"comment_id": [7, 7, 9]}, "texts/comments: comment_id 7 comes twice, in rows 0 and 1; each"),
        ("comments", {"likes": [0, -8, 2]}, "'likes' is -8 in row 1; it must be 0 or more"),
        ("comments", {"time_ms": [0, 0, -2]}, "'time_ms' is -2 in row 2; it must be -1 or more"),
        ("comments", {"text": ["a", None, "b"]}, "'text' has no value in row 1"),
        ("visits", {"staytime_ms": [0, -1]}, "'staytime_ms' is -1 in row 1; it must be 0 or more"),
        ("visits", {"user_id": [-1, 0]}, "'user_id' is -1 in row 0; it must be 0 or more"),
        ("visits", {"shown": [[5, 7], [-9]]}, "'shown' is -9 in row 1; it must be 0 or more"),
        ("visits", {"shown_likes": [[8], []]}, "'shown_likes' has 1 values in row 0; it must have as many as 'shown'"),
        ("visits", {"shown": [[5, 6], [9]]}, "'shown' in row 0 names comment 6, which is not in texts/comments"),
        (
            "visits",
            {"interacted": [[], [5]]},
            "'interacted' in row 1 names comment 5 of item 1; the visit is to item 2",
        ),
    ],
)
def test_a_bad_value_is_told_in_one_line(tmp_path: Path, name: str, changed: dict[str, Any], message: str) -> None:
    comments = table("comments", COMMENTS, **(changed if name == "comments" else {}))
    visits = table("visits", VISITS, **(changed if name == "visits" else {}))
    with pytest.raises(UserError) as error:
        write(tmp_path, comments, visits)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_id_that_comes_twice_in_two_parts_is_refused(tmp_path: Path) -> None:
    writer = TextWriter(tmp_path)
    for first in (1, 0, 2, 0):
        writer.add("comments", table("comments", COMMENTS).slice(first, 1))
    with pytest.raises(UserError, match="comment_id 7 comes twice, in rows 1 and 3; "):
        writer.finish()


@pytest.mark.parametrize(
    ("name", "changed", "row"),
    [
        ("comments", {"likes": [0, -8, 2]}, 4),
        ("comments", {"text": ["a", "b", None]}, 5),
        ("comments", {"comment_id": [1, 2, 1]}, 5),
        ("visits", {"shown": [[5, 7], [-9]]}, 3),
        ("visits", {"shown_likes": [[8], []]}, 2),
        ("visits", {"shown": [[5, 7], [6]]}, 3),
        ("visits", {"interacted": [[], [5]]}, 3),
    ],
)
def test_rows_count_over_all_parts_of_a_table(tmp_path: Path, name: str, changed: dict[str, Any], row: int) -> None:
    writer = TextWriter(tmp_path)
    writer.add("comments", table("comments", COMMENTS))
    if name == "visits":
        writer.add("visits", table("visits", VISITS))
    with pytest.raises(UserError, match=rf"row {row}|and {row};"):
        writer.add(name, table(name, COMMENTS if name == "comments" else VISITS, **changed))


def test_comments_after_visits_are_refused(tmp_path: Path) -> None:
    writer = TextWriter(tmp_path)
    writer.add("visits", table("visits", VISITS, shown=[[], []], shown_likes=[[], []], interacted=[[], []]))
    with pytest.raises(UserError, match="comments must be added before"):
        writer.add("comments", table("comments", COMMENTS))


def test_columns_that_do_not_fit_are_refused() -> None:
    whole = table("comments", COMMENTS)
    with pytest.raises(UserError, match="column 'likes' is missing"):
        checked("comments", whole.drop_columns(["likes"]))
    with pytest.raises(UserError, match="unknown column 'dislikes'"):
        checked("comments", whole.append_column("dislikes", whole.column("likes")))
    with pytest.raises(UserError, match="a wrong type"):
        checked("comments", whole.set_column(4, "likes", [["many", "few", "none"]]))
    with pytest.raises(UserError, match="not a text table; text tables are items"):
        checked("comment", whole)


def test_a_dataset_without_texts_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="limelight data simulate --texts"):
        read_texts(tmp_path, "comments")


def test_segments_have_ids_of_their_own() -> None:
    item, segment = np.array([0, 0, 1, (1 << 47) - 1]), np.array([0, 65_535, 0, 65_535], np.int32)
    ids = text_schema.segment_ids(item, segment)
    assert (np.diff(ids) > 0).all()
    with pytest.raises(UserError, match="too large"):
        text_schema.segment_ids(np.array([1]), np.array([65_536]))
    for item_id, segment in ((-1, 0), (1, -1)):
        with pytest.raises(UserError, match="is negative; both must be 0 or more"):
            text_schema.segment_ids(np.array([3, item_id]), np.array([3, segment]))


@given(st.lists(st.lists(st.integers(0, 2**62), max_size=5), max_size=8), st.integers(1, 6))
def test_lists_survive_and_are_padded(lists: list[list[int]], width: int) -> None:
    column = pa.chunked_array([pa.array(part, pa.list_(pa.int64())) for part in (lists[:3], lists[3:])])
    values, offsets = flat_lists(column)
    assert list_column(values, offsets).to_pylist() == lists
    padded = pad_lists(column, width)
    assert padded.tolist() == [(one + [-1] * width)[:width] for one in lists]


def test_a_builder_writes_texts_into_its_dataset(tmp_path: Path) -> None:
    visits = pa.table(make_visits(seed=1))
    with DatasetBuilder(tmp_path / "d", SPEC) as builder:
        for name, lines in make_tables().items():
            builder.table(name, lines)
        builder.visits(visits)
        builder.texts("comments", table("comments", COMMENTS))
        builder.finish()
    assert read_texts(tmp_path / "d", "comments").num_rows == 3


def test_a_bad_text_leaves_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comes twice"), DatasetBuilder(tmp_path / "d", SPEC) as builder:
        for name, lines in make_tables().items():
            builder.table(name, lines)
        builder.visits(pa.table(make_visits(seed=1)))
        for _ in range(2):
            builder.texts("comments", table("comments", COMMENTS))
        builder.finish()
    assert list(tmp_path.iterdir()) == []


SEGMENTS: dict[str, Any] = {"item_id": [4, 4], "segment": [0, 1], "start_ms": [1_000, 31_000], "text": ["a", "b"]}


def test_a_segment_is_known_at_its_end_where_the_table_does_not_say_when(tmp_path: Path) -> None:
    writer = TextWriter(tmp_path)
    writer.add("segments", table("segments", SEGMENTS))
    writer.finish()
    assert read_texts(tmp_path, "segments", ["known_ms"]).to_pydict() == {"known_ms": [31_000, 61_000]}
    # a table of an earlier version has no such column at all
    file = tmp_path / "texts" / "segments.parquet"
    pq.write_table(pq.read_table(file).drop_columns("known_ms"), file)
    assert read_texts(tmp_path, "segments", ["known_ms", "text"]).to_pydict() == {
        "known_ms": [31_000, 61_000],
        "text": ["a", "b"],
    }
    assert read_texts(tmp_path, "segments").column_names == SCHEMAS["segments"].names


def test_a_processing_delay_is_kept(tmp_path: Path) -> None:
    writer = TextWriter(tmp_path)
    for part in ([31_000, 61_500], [32_000, 65_000]):
        writer.add("segments", pa.table({**SEGMENTS, "known_ms": part}))
    writer.finish()
    assert read_texts(tmp_path, "segments", ["known_ms"]).column(0).to_pylist() == [31_000, 61_500, 32_000, 65_000]


def test_a_segment_known_before_its_end_is_refused(tmp_path: Path) -> None:
    early = pa.table({**SEGMENTS, "known_ms": [31_000, 60_999]})
    message = "row {}: known_ms is 60999, before the end of the segment; it must be start_ms .* here 61000"
    with pytest.raises(UserError, match=message.format(8)):
        checked("segments", early, first_row=7)
    (tmp_path / "texts").mkdir()
    pq.write_table(early, tmp_path / "texts" / "segments.parquet")
    with pytest.raises(UserError, match=message.format(1)):
        read_texts(tmp_path, "segments", ["item_id", "known_ms"])
    assert read_texts(tmp_path, "segments", ["text"]).num_rows == 2
