"""``limelight stream``: what it writes and prints, and how it answers mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.cli import stream as stream_module
from launch.cli.main import main
from tests.stream.random_logs import BEHAVIOURS, SPEC
from tests.stream.reference import Event, assemble
from tests.stream.stored_logs import Edit, with_column, write_log
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS
from trainer.stream.labels.policy import POLICIES, EventTimeouts, FastSlow, Realtime

MINUTE = 60_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "dataset"
    simulate(out, users=200, days=2, partitions=3, seed=5)
    return out


def stream(*arguments: object) -> int:
    return main(["stream", *map(str, arguments)])


def test_help_names_the_policies_and_defaults_of_the_assembler() -> None:
    policies = (FastSlow(), Realtime(), EventTimeouts())
    defaults = {name.removesuffix("_ms"): ms / 1000 for part in policies for name, ms in vars(part).items()}
    assert defaults == {name.replace("-", "_"): s for name, s in stream_module.DEFAULT_SECONDS.items()}
    assert tuple(POLICIES) == stream_module.POLICIES


def test_full_rows_are_the_training_rows_of_the_dataset(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    assert stream("assemble", world, "--policy", "full", out) == 0
    written, spec = pq.read_table(out), DatasetSpec.load(world)
    stored = read_rows(world, spec)
    ours, theirs = np.argsort(written["visit_id"].to_numpy()), np.argsort(stored["visit_id"])
    assert len(ours) == spec.rows
    for name in ("visit_id", "user_id", "author_id", "item_id", "request_ms", "emit_ms"):
        assert np.array_equal(written[name].to_numpy()[ours], stored[name][theirs])
    for k, behaviour in enumerate(spec.behaviours):
        assert np.array_equal(written[f"label_{behaviour}"].to_numpy()[ours], stored["label"][theirs, k])
        assert np.array_equal(written[f"mask_{behaviour}"].to_numpy()[ours], stored["mask"][theirs, k])
    assert set(written["kind"].to_pylist()) == {"full"}


@pytest.mark.parametrize("policy", POLICIES)
def test_both_modes_write_the_same_rows_and_find_the_same_unused_events(
    world: Path, tmp_path: Path, policy: str
) -> None:
    """The log arrives in disorder, and some of it too late."""
    log = tmp_path / "log"
    shutil.copytree(world, log, ignore=shutil.ignore_patterns("rows", "history", "truth", CHECKSUMS))
    rng = np.random.default_rng(0)
    for file in sorted((log / "events").iterdir()):
        table = pq.read_table(file)
        delay = np.where(rng.random(table.num_rows) < 0.3, rng.integers(0, 90_000, table.num_rows), 0)
        pq.write_table(table.take(pa.array(np.argsort(table["time_ms"].to_numpy() + delay, kind="stable"))), file)
    unused_by_mode = []
    for mode in ("batch", "incremental"):
        assert stream("assemble", log, "--policy", policy, tmp_path / f"{mode}.parquet", "--mode", mode) == 0
        unused = pq.read_table(tmp_path / f"{mode}.unused_events.parquet")
        names = unused.column_names
        unused_by_mode.append(sorted(zip(*(unused[name].to_pylist() for name in names), strict=True)))
    written = [pq.read_table(tmp_path / f"{mode}.parquet") for mode in ("batch", "incremental")]
    assert written[0].equals(written[1]) and written[0].num_rows > 900
    assert unused_by_mode[0] == unused_by_mode[1] != []
    assert names == [*pq.read_table(file).column_names, "reason"]


def test_rows_in_the_file_are_those_of_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [Event(user, user + 7, 1, 2, "live", "exposure", 1_000 * user) for user in range(40)]
    events += [Event(user, user + 7, 1, 2, "live", "gift", 1_000 * user + 400 * user) for user in range(0, 40, 3)]
    events += [Event(user, user + 7, 1, 2, "live", "exit", 1_000 * user + 9_000) for user in range(30)]
    events.sort(key=lambda event: event.time_ms)
    log, out = write_log(tmp_path / "log", events), tmp_path / "rows.parquet"
    windows = ("--fast-seconds", 5, "--slow-seconds", 8.5)
    assert stream("assemble", log, out, "--policy", "fast_slow", *windows, "--idle-seconds", 20) == 0
    policy, timeouts = FastSlow(5_000, 8_500), EventTimeouts(20_000, 10_000)
    expected, unused = assemble(events, policy, timeouts, BEHAVIOURS, SPEC.applies, SPEC.candidates)
    table = pq.read_table(out)
    assert table.column_names == [
        *("visit_id", "user_id", "author_id", "item_id", "kind", "request_ms", "emit_ms"),
        *("label_click", "mask_click", "label_like", "mask_like", "label_gift", "mask_gift"),
    ]
    found = [
        (row["emit_ms"], row["user_id"], row["kind"], tuple(row[f"label_{name}"] for name in BEHAVIOURS))
        for row in table.to_pylist()
    ]
    assert sorted(found) == sorted((row.emit_ms, row.user_id, row.kind, row.label) for row in expected)
    kinds = [row.kind for row in expected]
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("assembling: ")]
    counted = f"{kinds.count('fast')} fast, {kinds.count('slow')} slow"
    assert lines[0] == f"{out}: {len(expected)} rows of 40 visits ({counted})"
    assert lines[1].startswith("rows to those of fast_slow: 1.")
    assert lines[2].endswith(f"{len(unused)} events that change no row ({len(unused)} no_open_visit)")
    assert stream("assemble", log, out, "--policy", "fast_slow", *windows, "--idle-seconds", 20, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["visits"] == 40 and sum(document["rows"].values()) == len(expected)
    assert document["unused_events"] == {"no_open_visit": len(unused)}


def test_consistency_counts_what_is_known_at_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: first gifts at 5 min (in), 5 min + 1 ms and 1 h (late), 1 h + 1 ms (not at all); money of all gifts."""
    at = (5 * MINUTE, 5 * MINUTE + 1, 60 * MINUTE, 60 * MINUTE + 1)
    events, values = [], []
    for user, delay in enumerate(at):
        for name, time_ms, value in (("exposure", 0, 0), ("gift", delay, 10.0), ("gift", delay + 2, 1.0)):
            events.append(Event(user, user, 1, 2, "live", name, time_ms))
            values.append(value)
    # The first gift twice: the same event is one.
    events.append(events[1])
    values.append(values[1])
    order = np.argsort([event.time_ms for event in events], kind="stable")
    # Of a stored log nothing is late, in whatever order it is.
    order = [*order[3:], *order[:3]]
    log = write_log(tmp_path / "log", [events[k] for k in order], values=[values[k] for k in order])
    assert stream("consistency", log, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["behaviours"]["gift"] == {"positives": 3, "early": 1, "share": 1 / 3, "paper": 0.68}
    # The last gift but one of the third visit is inside the hour, its second one is not.
    assert figures["behaviours"]["gift price"] == {"positives": 32.0, "early": 10.0, "share": 10 / 32, "paper": 0.34}
    assert figures["behaviours"]["click"] == {"positives": 0, "early": 0, "share": None, "paper": 0.96}
    assert figures["rows"]["fast_slow"] == {"all": 6, "active": 6} and figures["rows"]["realtime"]["all"] == 8
    assert stream("consistency", log) == 0
    text = capsys.readouterr().out
    assert (
        "gift                 3             1  33.3%  68.0%" in text
        and "click                0             0      -" in text
    )


def test_consistency_of_the_simulated_world_is_about_the_papers(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream("consistency", world, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    for name, seen in figures["behaviours"].items():
        assert (seen["paper"] is None) == (name in ("effective_view", "follow"))
        if name in ("click", "long_view"):
            error = np.sqrt(seen["paper"] * (1 - seen["paper"]) / seen["positives"])
            assert abs(seen["share"] - seen["paper"]) <= 4.5 * error
    rows = figures["rows"]
    assert rows["full"]["all"] == figures["visits"] and rows["full"]["active"] == figures["active_visits"]
    assert all(rows[name]["active"] < rows[name]["all"] for name in POLICIES)


GOOD = [Event(1, 5, 2, 3, "live", name, time_ms) for name, time_ms in (("exposure", 10), ("enter", 11), ("exit", 12))]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_column("event", pa.array(["exposure", "wave", "exit"])), "column 'event' is 'wave' in row 1; known are "),
        (with_column("time_ms", pa.array([10, -4, 12])), "column 'time_ms' is -4 in row 1; it must be 0 or more"),
        (
            with_column("time_ms", pa.array([10, 11, 1 << 60])),
            "row 2; it must be no more than a day ahead of the clock",
        ),
        (with_column("time_ms", pa.array([10, None, 12])), "column 'time_ms' has no value in row 1"),
        (with_column("user_id", pa.array([1, 1, -1])), "column 'user_id' is -1 in row 2"),
        (
            with_column("user_id", pa.array([1, 1, 2])),
            "column 'user_id' is 2 in row 2; it must be of a user of partition",
        ),
        (with_column("domain", pa.array([1, 1, 2], pa.int8())), "column 'domain' is 2 in row 2"),
        (with_column("value", pa.array([0, 0, float("nan")])), "column 'value' is nan in row 2; it must be finite"),
        (lambda table: table.drop_columns("item_id"), "column 'item_id' is missing"),
        (with_column("time_ms", pa.array([10, 11, 9])), "visit 5 of user 1 exits at 9 before it starts at 10"),
    ],
)
@pytest.mark.parametrize("command", ["assemble", "consistency"])
def test_malformed_events(
    tmp_path: Path, command: str, edit: Edit, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "log", GOOD, edit)
    arguments = (log, "--policy", "realtime", tmp_path / "rows.parquet") if command == "assemble" else (log,)
    assert stream(command, *arguments) == 2
    printed = capsys.readouterr()
    error = printed.err.splitlines()[-1]
    assert error.startswith("limelight: error: ") and message in error and "events/part-0000" in error
    assert printed.out == "" and [file.name for file in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none", "--policy", "full", "{}/out.parquet"], "no dataset here"),
        (["{}/log", "--policy", "fully", "{}/out.parquet"], "'fully' is not one of 'full', 'fast_slow', 'realtime'"),
        (
            ["{}/log", "--policy", "full", "{}/out.parquet", "--tick-seconds", "3"],
            "policy full has no setting 'tick_ms'",
        ),
        (["{}/log", "--policy", "realtime", "{}/out.parquet", "--tick-seconds", "0"], "tick_ms is 0"),
        (["{}/log", "--policy", "full", "{}/out.parquet", "--idle-seconds", "0"], "idle_ms is 0"),
        (["{}/log", "--policy", "full", "{}/none/out.parquet"], "none/out.parquet: cannot be written (No such file"),
        (["{}/broken", "--policy", "full", "{}/out.parquet"], "part-00000.parquet: not a readable Parquet file"),
        (["{}/empty", "--policy", "full", "{}/out.parquet"], "the dataset has no event log of this partition"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "log", GOOD)
    (write_log(tmp_path / "broken", GOOD) / "events" / "part-00000.parquet").write_bytes(b"PAR1 and no more")
    shutil.rmtree(write_log(tmp_path / "empty", GOOD) / "events")
    there = sorted(tmp_path.iterdir())
    assert stream("assemble", *(argument.format(tmp_path) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("limelight: error: ") and printed.err.count("\n") == 1 and message in printed.err
    assert printed.out == "" and sorted(tmp_path.iterdir()) == there


def test_unused_events_of_an_earlier_command_do_not_stay(tmp_path: Path) -> None:
    orphan = Event(1, 9, 2, 3, "live", "like", 11)
    out, unused = tmp_path / "rows.parquet", tmp_path / "rows.unused_events.parquet"
    assert stream("assemble", write_log(tmp_path / "first", [*GOOD, orphan]), out, "--policy", "full") == 0
    assert pq.read_table(unused).to_pylist()[0]["reason"] == "no_open_visit"
    assert stream("assemble", write_log(tmp_path / "second", GOOD), out, "--policy", "full") == 0
    assert not unused.exists() and pq.read_table(out).num_rows == 1
