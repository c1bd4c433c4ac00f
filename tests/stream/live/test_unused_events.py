"""Tests of the log of events that change no row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.stream.random_logs import SPEC, columns_of
from tests.stream.reference import Event
from trainer.console.errors import UserError
from trainer.stream.labels.assembled_rows import LATE, NO_OPEN_VISIT, select_unused
from trainer.stream.live.unused_events import UnusedEventLog

EVENTS = [Event(1, 2, 3, 4, "live", "gift", 500), Event(5, 6, 7, 8, "video", "exit", 900)]


def test_events_are_appended_with_their_reason(tmp_path: Path) -> None:
    log = UnusedEventLog(tmp_path, SPEC, 3)
    log.write(select_unused(columns_of(EVENTS), np.array([], np.int64), LATE))
    assert not list(tmp_path.iterdir()), "nothing was written"
    log.write(select_unused(columns_of(EVENTS), np.array([0]), LATE))
    UnusedEventLog(tmp_path, SPEC, 3).write(select_unused(columns_of(EVENTS), np.array([1]), NO_OPEN_VISIT))
    lines = (tmp_path / "unused_events" / "rank-00003.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {**event._asdict(), "value": 0.0, "reason": reason}
        for event, reason in zip(EVENTS, ("late", "no_open_visit"), strict=True)
    ]


def test_a_run_with_the_directory_of_an_earlier_version_continues_in_the_new_one(tmp_path: Path) -> None:
    old = tmp_path / "aside" / "rank-00000.jsonl"
    old.parent.mkdir()
    old.write_text("{}\n")
    UnusedEventLog(tmp_path, SPEC, 0).write(select_unused(columns_of(EVENTS), np.array([0]), LATE))
    assert old.read_text() == "{}\n", "the earlier events stay where they are"
    assert len((tmp_path / "unused_events" / "rank-00000.jsonl").read_text().splitlines()) == 1


def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "unused_events").write_text("in the way")
    with pytest.raises(UserError, match=r"unused_events.*cannot be written"):
        UnusedEventLog(tmp_path, SPEC, 0).write(select_unused(columns_of(EVENTS), np.array([0]), LATE))
