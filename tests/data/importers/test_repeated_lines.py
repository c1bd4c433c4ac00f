"""Tests of lines that repeat an earlier one: every importer counts them, drops them by one rule, and says so."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main
from tests.data.importers import test_kuaicomt, test_kuailive, test_kuailive_m3, test_kuairand
from tests.data.importers.test_events import EVENTS, EXPOSURE_LINES, EXPOSURES, T0, events_of, rows_of, write
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.text_schema import read_texts
from trainer.data.importers.events import import_events
from trainer.data.importers.import_notes import import_notes
from trainer.data.importers.kuaicomt import import_kuaicomt
from trainer.data.importers.kuailive import import_kuailive
from trainer.data.importers.kuailive_m3 import import_kuailive_m3
from trainer.data.importers.kuairand import import_kuairand

KEEP = 'duplicates = "keep"\n'
EVENT_LINES = f"user,author,item,time,action,amount\n1,10,100,{T0},show,\n1,10,100,{T0 + 5},gift,3\n"


def test_a_repeated_exposure_is_dropped_and_counted(tmp_path: Path) -> None:
    lines = EXPOSURE_LINES + EXPOSURE_LINES.splitlines()[3] + "\n"
    spec = import_events(**write(tmp_path / "drop", EXPOSURES, lines))
    assert (spec.rows, spec.extra["duplicate_lines"], spec.extra["duplicates_dropped"]) == (3, 1, 1)
    assert import_notes(spec.extra) == [
        "repeated lines: 1 (equal to an earlier line in all columns that are read; dropped)"
    ]
    spec = import_events(**write(tmp_path / "keep", KEEP + EXPOSURES, lines))
    assert (spec.rows, spec.extra["duplicate_lines"], spec.extra["duplicates_dropped"]) == (4, 1, 0)
    assert import_notes(spec.extra) == [
        "repeated lines: 1 (equal to an earlier line in all columns that are read; kept)"
    ]


def test_a_line_in_another_file_is_a_repetition_too(tmp_path: Path) -> None:
    arguments = write(tmp_path, EXPOSURES, EXPOSURE_LINES)
    (arguments["src"] / "b.csv").write_text(EXPOSURE_LINES.replace("7,71", "07,71").replace("\n8", "\n8.0"))
    spec = import_events(**arguments)
    assert (spec.rows, spec.extra["log_rows"], spec.extra["duplicate_lines"]) == (3, 6, 3)


@pytest.mark.parametrize(
    ("old", "new"), [(",0.5", ",0.25"), (",5000,", ",5001,"), (",home,", ",hot,"), ("1200", "1201"), ("7,70", "9,70")]
)
def test_a_line_with_another_value_is_no_repetition(tmp_path: Path, old: str, new: str) -> None:
    header, line = EXPOSURE_LINES.splitlines()[:2]
    spec = import_events(**write(tmp_path, EXPOSURES, f"{header}\n{line}\n{line.replace(old, new)}\n"))
    assert (spec.rows, spec.extra["duplicate_lines"]) == (2, 0) and not import_notes(spec.extra)


def test_a_repeated_event_is_dropped_and_counted(tmp_path: Path) -> None:
    lines = EVENT_LINES + f"1,10,100,{T0 + 5},gift,3\n1,10,100,{T0 + 5},gift,4\n1,10,100,{T0},show,\n"
    lines = "\n".join([lines.splitlines()[0], *sorted(lines.splitlines()[1:], key=lambda line: line.split(",")[3])])
    for name, rows, gifts, kept in (("drop", 1, 2, ""), ("keep", 2, 3, KEEP)):
        spec = import_events(**write(tmp_path / name, kept + EVENTS, lines + "\n"))
        assert (spec.rows, spec.extra["duplicate_lines"]) == (rows, 2)
        assert spec.extra["duplicates_dropped"] == (0 if kept else 2)
        events = events_of(tmp_path / name / "out")
        assert [event[1] for event in events].count("gift") == gifts
        assert rows_of(tmp_path / name / "out")["label"][-1].tolist() == [0, 1]


def repeat_first_line(file: Path) -> None:
    """Append the first line below the header of a CSV file to it again."""
    with open(file, newline="") as opened:
        lines = list(csv.reader(opened))
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows([*lines, lines[1]])


IMPORTERS: dict[str, tuple[Callable[..., Any], Callable[..., DatasetSpec], tuple[str, ...]]] = {
    "kuairand": (test_kuairand.write_version, import_kuairand, ("data/log_standard_4_22_to_5_08_27k_part2",)),
    "kuailive": (
        test_kuailive.write_source,
        import_kuailive,
        ("click", "negative", "like", "gift"),
    ),
    "kuaicomt": (test_kuaicomt.write, import_kuaicomt, ("user_video_inter", "user_comment_inter")),
    "kuailive_m3": (
        test_kuailive_m3.write_source,
        import_kuailive_m3,
        ("live_interaction", "live_like", "live_comment"),
    ),
}


@pytest.mark.parametrize(("name", "log"), [(name, log) for name, (_, _, logs) in IMPORTERS.items() for log in logs])
def test_a_published_log_with_a_line_twice(tmp_path: Path, name: str, log: str) -> None:
    write_source, import_log, _ = IMPORTERS[name]
    write_source(tmp_path / "src")
    before = import_log(tmp_path / "src", tmp_path / "before", 2)
    repeat_first_line(tmp_path / "src" / f"{log}.csv")
    after = import_log(tmp_path / "src", tmp_path / "after", 2)
    assert after.extra["duplicate_lines"] == before.extra["duplicate_lines"] + 1
    assert (after.rows, after.exposures, after.events) == (before.rows, before.exposures, before.events)
    assert any(note.startswith("repeated lines: ") for note in import_notes(after.extra))
    if name == "kuailive_m3":
        tables = [read_texts(tmp_path / out, "comments") for out in ("before", "after")]
        assert tables[0].equals(tables[1])
    if name == "kuaicomt":
        visits = [read_texts(tmp_path / out, "visits") for out in ("before", "after")]
        assert visits[0].equals(visits[1]), "an interaction counts once in the comments at the top"


def test_the_command_says_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = EVENT_LINES + f"1,10,100,{T0 + 5},gift,3\n2,10,100,{T0 + 6},gift,3\n"
    arguments = write(tmp_path, 'orphans = "drop"\n' + EVENTS, lines)
    (arguments["src"] / "notes.txt").write_text("")
    command = [str(arguments["src"]), str(arguments["out"]), "--mapping", str(arguments["mapping"])]
    assert main(["data", "import", "events", *command]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-4:-1] == [
        "  repeated lines: 1 (equal to an earlier line in all columns that are read; dropped)",
        "  events without a visit: 1 (none began before them; dropped)",
        "  files left out: 1 (notes.txt, ...: no tables, or `files` of the mapping does not match them)",
    ]
