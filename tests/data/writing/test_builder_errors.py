"""Input that the dataset builder refuses; no files are left if it cannot finish."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from tests.data.small_visits import SPEC, START, files_of, make_tables, make_visits
from tests.paths import ROOT
from trainer.console.errors import UserError
from trainer.data.format.schema import EVENT_COLUMNS, DenseFeature
from trainer.data.writing.builder import DatasetBuilder


def edited(**changes) -> pa.Table:
    """Make visits with the value ``changes[column]`` in row 7; a column that becomes None is left out."""
    visits = make_visits(0)
    for name, value in changes.items():
        if value is None:
            del visits[name]
        else:
            visits[name][7] = value
    return pa.table(visits)


BAD_VISITS = {
    "negative user": (edited(user_id=-4), "visits: column 'user_id' is -4 in row 7; it must be 0 or more"),
    "negative time": (edited(request_ms=-1), "visits: column 'request_ms' is -1 in row 7"),
    "negative play": (edited(play_ms=-9), "visits: column 'play_ms' is -9 in row 7"),
    "exit before request": (
        edited(exit_ms=START - 5),
        f"visits: column 'exit_ms' is {START - 5} in row 7; it must be req",
    ),
    "exit before a behaviour": (edited(delay_like=9999), "visits: column 'exit_ms' is .* in row 7; .*last behaviour"),
    "delay": (edited(delay_click=-2), "visits: column 'delay_click' is -2 in row 7; it must be -1"),
    "domain": (edited(domain=2), r"visits: column 'domain' is 2 in row 7; it must be in \[0, 2\)"),
    "side": (edited(tab=4), r"visits: column 'tab' is 4 in row 7; it must be in \[0, 4\)"),
    "side below": (edited(tab=-1), r"visits: column 'tab' is -1 in row 7; it must be in \[0, 4\)"),
    "not finite": (edited(load=np.nan), "visits: column 'load' is nan in row 7; it must be finite"),
    "infinite value": (edited(value_gift=np.inf), "visits: column 'value_gift' is inf in row 7"),
    "missing": (edited(item_id=None), "visits: column 'item_id' is missing"),
    "text": (
        edited(item_id=None).append_column("item_id", pa.array(["seven"] * 300)),
        "visits: column 'item_id' is not int64",
    ),
    "rounded ids": (
        edited(item_id=None).append_column("item_id", pa.array([2.0**53 + 2] * 300)),
        "visits: column 'item_id' is not int64 .float does not hold the id exactly",
    ),
    "time of a day": (
        edited(request_ms=None).append_column("request_ms", pa.array([5] * 300, pa.time64("us"))),
        "visits: column 'request_ms' is not int64 .it is time64",
    ),
    "duration": (
        edited(play_ms=None).append_column("play_ms", pa.array([5] * 300, pa.duration("us"))),
        "visits: column 'play_ms' is not int64 .it is duration",
    ),
    "unknown": (edited().append_column("fame", pa.array(np.zeros(300))), "visits: unknown column 'fame'"),
    "null": (
        edited(load=None).append_column("load", pa.array([None if row == 7 else 1.0 for row in range(300)])),
        "visits: column 'load' has no value in row 7",
    ),
}


@pytest.mark.parametrize("case", BAD_VISITS)
def test_a_bad_visit_is_named_and_nothing_is_left(tmp_path, case):
    table, message = BAD_VISITS[case]
    with pytest.raises(UserError, match=message) as caught, DatasetBuilder(tmp_path / "out", SPEC) as builder:
        builder.visits(pa.table(make_visits(0)))
        builder.visits(table)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


ITEMS = make_tables()["items"]
BAD_TABLES = {
    "unknown table": ("rooms", ITEMS, "'rooms' is not a table of a dataset"),
    "missing feature": ("items", ITEMS.drop_columns("topic"), "items: column 'topic' is missing"),
    "missing id": ("items", ITEMS.drop_columns("item_id"), "items: column 'item_id' is missing"),
    "twice": ("items", pa.concat_tables([ITEMS, ITEMS.slice(1, 1)]), "items: item_id 3 comes twice"),
    "side": ("items", ITEMS.set_column(1, "topic", [[1, 2, 6, 0]]), r"items: column 'topic' is 6 in row 2; .*\[0, 6\)"),
    "dense": ("items", ITEMS.set_column(2, "price", [[1, 2, np.inf, 0]]), "items: column 'price' is inf in row 2"),
    "negative": ("items", ITEMS.set_column(0, "item_id", [[1, -2, 6, 0]]), "items: column 'item_id' is -2 in row 1"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_named_and_nothing_is_left(tmp_path, case):
    name, table, message = BAD_TABLES[case]
    with pytest.raises(UserError, match=message), DatasetBuilder(tmp_path / "out", SPEC) as builder:
        builder.table(name, table)
    assert not list(tmp_path.iterdir())


def test_parts_of_a_table_must_agree(tmp_path):
    for table, message in ((ITEMS, "comes twice"), (ITEMS.set_column(0, "item_id", [[30, 31, 32, 33]]), None)):
        other = table if message else table.append_column("colour", pa.array(list("abcd")))
        with (
            pytest.raises(UserError, match=message or "same columns"),
            DatasetBuilder(tmp_path / "out", SPEC) as builder,
        ):
            builder.table("items", ITEMS)
            builder.table("items", other)


@pytest.mark.parametrize(("name", "row"), [("ride", 1), (None, 1)])
def test_an_unknown_event_is_named(tmp_path, name, row):
    events = pa.table(
        {
            **{name: [1, 1] for name in ("user_id", "author_id", "item_id", "visit_id", "time_ms", "domain")},
            "event": ["click", name],
            "value": [0.0, 0.0],
        }
    )
    with (
        pytest.raises(
            UserError, match=f"events: column 'event' is {name} in row {row}; known events are exposure, enter"
        ),
        DatasetBuilder(tmp_path / "out", SPEC) as builder,
    ):
        builder.events(events)


def test_finish_needs_visits_and_tables(tmp_path):
    with pytest.raises(UserError, match="there are no visits"), DatasetBuilder(tmp_path / "out", SPEC) as builder:
        builder.finish()
    with (
        pytest.raises(UserError, match="table 'users' was not given; the features age, wealth are its columns"),
        DatasetBuilder(tmp_path / "out", SPEC) as builder,
    ):
        builder.visits(pa.table(make_visits(0)))
        builder.finish()
    assert not list(tmp_path.iterdir())


BAD_SPECS = {
    "partitions is 0": {"partitions": 0},
    "0 behaviours": {"behaviours": ()},
    "32 behaviours": {"behaviours": tuple(f"b{k}" for k in range(32))},
    "'tab' is the name of two": {"dense": (DenseFeature("tab", "user"),)},
    "'gift' has no entry in `applies`": {"applies": {"click": (), "like": ()}},
    "'radio' is not a domain": {"candidates": ("radio",)},
    r"statistics key \('tab', 'mood'\)": {"statistics": (("tab", "mood"),)},
    "tag 'age' is not a side feature of items; items have topic": {"tag": "age"},
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_a_description_must_make_sense(tmp_path, message):
    with pytest.raises(UserError, match=message):
        DatasetBuilder(tmp_path / "out", replace(SPEC, **BAD_SPECS[message]))
    assert not list(tmp_path.iterdir())


def test_out_must_be_new_and_local(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        DatasetBuilder(tmp_path / "out", SPEC)
    with pytest.raises(UserError, match="built on a local disk"):
        DatasetBuilder("s3://bucket/out", SPEC)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        DatasetBuilder(tmp_path / "file" / "out", SPEC)


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with DatasetBuilder(tmp_path / "out", SPEC) as builder:
        builder.visits(pa.table(make_visits(0)))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["sorting visits", "writing rows"])
def test_an_interrupt_leaves_nothing(tmp_path, stage):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DatasetBuilder(tmp_path / "out", SPEC) as builder:
        for name, table in make_tables().items():
            builder.table(name, table)
        builder.visits(pa.table(make_visits(0)))
        builder.finish(interrupt)
    assert not list(tmp_path.iterdir())


def test_somebody_else_was_faster(tmp_path):
    with pytest.raises(UserError, match="out: cannot be written"), DatasetBuilder(tmp_path / "out", SPEC) as builder:
        for name, table in make_tables().items():
            builder.table(name, table)
        builder.visits(pa.table(make_visits(0)))
        (tmp_path / "out").mkdir()
        (tmp_path / "out/dataset.json").write_text("theirs")
        builder.finish()
    assert files_of(tmp_path) == {"out/dataset.json": b"theirs"}


@pytest.mark.parametrize("stage", ["taking tables", "taking visits", "sorting visits", "writing rows"])
def test_a_disk_that_is_full(tmp_path, stage):
    """The builder runs in a process whose files cannot grow from some stage on, as on a full disk."""
    script = f"""
import functools, resource, sys
import pyarrow as pa
from tests.data.small_visits import SPEC, make_tables, make_visits
from trainer.console.errors import UserError
from trainer.data.writing import builder, training_rows

def reach(stage, done=1, total=1):
    if stage == {stage!r} and done:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

builder.assemble = functools.partial(training_rows.assemble, rows_per_slice=500)
visits = make_visits(0, n=3000)
try:
    with builder.DatasetBuilder(sys.argv[1], SPEC) as opened:
        reach("taking tables")
        for name, table in make_tables().items():
            opened.table(name, table)
        reach("taking visits")
        opened.visits(pa.table(visits))
        opened.finish(reach)
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-B", "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}: cannot be written (File too large)\n"
    assert not list(tmp_path.iterdir())


def test_all_events_or_only_repeats(tmp_path):
    nothing = EVENT_COLUMNS.empty_table()
    with (
        pytest.raises(UserError, match="add all events, or only the repeats"),
        DatasetBuilder(tmp_path / "o", SPEC) as builder,
    ):
        builder.visits(pa.table(make_visits(0)))
        builder.events(nothing)
        builder.repeats(nothing)
        builder.finish()
