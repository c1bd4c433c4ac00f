"""Tests of the check that an id stands for one thing, against a dictionary, and through the import of a log."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.importers.test_events import EVENTS, EXPOSURE_LINES, EXPOSURES, T0, write
from trainer.console.errors import UserError
from trainer.data.importers import id_consistency
from trainer.data.importers.events import import_events
from trainer.data.importers.id_consistency import Contradiction, IdConsistency, line_hash

NAMES = ("item_id", "author_id", "domain")


def by_definition(lines: list[tuple[int, int, int]]) -> int | None:
    """Return the first line whose id had other values before, or None."""
    known: dict[int, tuple[int, int]] = {}
    return next(
        (row for row, (id, *rest) in enumerate(lines) if known.setdefault(id, tuple(rest)) != tuple(rest)), None
    )


IDS = st.one_of(st.integers(0, 4), st.sampled_from([2**63 - 1, 2**62, 70_000, 1 << 48]))
LINES = st.lists(st.tuples(IDS, st.sampled_from([1, 1, 1, 1, 2]), st.just(0)), max_size=30)


def check_first_contradiction(folder: Path, lines: list[tuple[int, int, int]], size: int) -> None:
    check = IdConsistency(folder, "item_id", NAMES[1:])
    for first in range(0, len(lines), size):
        part = lines[first : first + size]
        columns = {name: np.array([line[k] for line in part], np.int64) for k, name in enumerate(NAMES)}
        check.add({**columns, "row": np.arange(first, first + len(part))})
    found, expected = check.find(), by_definition(lines)
    assert (None if found is None else found.row) == expected
    if found is not None:
        assert lines[found.row][0] == lines[found.earlier][0] == found.id and found.earlier < found.row
        assert (found.column, found.value, found.other) == (
            "author_id",
            lines[found.row][1],
            lines[found.earlier][1],
        )


@given(LINES, st.integers(1, 7))
@settings(max_examples=1_000, deadline=None)
def test_the_first_contradiction_is_found(lines: list[tuple[int, int, int]], size: int) -> None:
    # A visit to each of the usual 256 parts takes all the time for a few lines.
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(id_consistency, "_PARTS", 3):
        check_first_contradiction(Path(folder) / "spill", lines, size)


@pytest.mark.slow
@given(LINES, st.integers(1, 7))
@settings(max_examples=100_000, deadline=None)
def test_the_first_contradiction_is_found_at_length(lines: list[tuple[int, int, int]], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_first_contradiction(Path(folder) / "spill", lines, size)


def test_many_lines_take_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million lines of a thousand items; the contradiction is the last line."""
    rng = np.random.default_rng(0)
    check = IdConsistency(tmp_path / "spill", "item_id", NAMES[1:])
    for first in range(0, 1_000_000, 100_000):
        item = rng.integers(0, 1000, 100_000)
        columns = {"item_id": item, "author_id": item // 10, "domain": item % 2}
        check.add({**columns, "row": np.arange(first, first + 100_000)})
    last = {"item_id": np.array([777]), "author_id": np.array([3]), "domain": np.array([1])}
    check.add({**last, "row": np.array([1_000_000])})
    check._spill.flush()
    assert check._spill.rows < 10_000
    found = check.find()
    assert found is not None
    assert (found.id, found.row, found.column, found.value, found.other) == (777, 1_000_000, "author_id", 3, 77)
    assert isinstance(found, Contradiction) and id_consistency._PARTS > 1


def test_line_hashes_tell_lines_apart() -> None:
    lines = {"row": np.arange(5), "a": np.array([1, 1, 2, 1, 0]), "b": np.array([0.5, 0.5, 0.5, 0.25, 0])}
    hashes = line_hash(lines)
    assert hashes[0] == hashes[1] and len(set(hashes.tolist())) == 4


WITH_VISITS = EXPOSURES.replace("[columns]", '[columns]\nvisit_id = "visit"', 1)
VISIT_LINES = EXPOSURE_LINES.replace("uid,", "visit,uid,").replace("\n7,70", "\n1,7,70").replace("\n7,71", "\n2,7,71")
VISIT_LINES = VISIT_LINES.replace("\n8,", "\n3,8,")
EVENT_LINES = f"user,author,item,time,action,amount,visit\n1,10,100,{T0},show,,1\n1,10,100,{T0 + 5},like,,1\n"
WITH_VISITS_OF_EVENTS = EVENTS.replace("[columns]", '[columns]\nvisit_id = "visit"', 1)


@pytest.mark.parametrize(
    ("mapping", "lines", "more", "message"),
    [
        (
            WITH_VISITS,
            VISIT_LINES,
            "1,8,70,700,1650000003000,0,v,0,0,,0,,",
            r"b\.csv: row 1: column 'visit' is 1; .*one visit; row 1 of a\.csv has it with user_id 7 \(here 8\)",
        ),
        (
            WITH_VISITS,
            VISIT_LINES.replace("\n3,8", "\n2,8"),
            "",
            r"a\.csv: row 3: column 'visit' is 2; .*row 2 of a\.csv has it with user_id 7 \(here 8\)",
        ),
        (
            WITH_VISITS,
            VISIT_LINES + "3,8,70,702,1650000002000,9000,party,0,false,,2.5,hot,1\n",
            "",
            r"a\.csv: row 4: column 'visit' is 3; .*row 3 of a\.csv has it with other outcomes or features",
        ),
        (
            EXPOSURES,
            EXPOSURE_LINES,
            "9,79,700,1650000003000,0,v,0,0,,0,,",
            r"b\.csv: row 1: column 'room' is 700; .*one author.*row 1 of a\.csv has it with author_id 70 \(here 79\)",
        ),
        (
            EXPOSURES,
            EXPOSURE_LINES,
            "9,70,700,1650000003000,0,l,0,0,,0,,",
            r"b\.csv: row 1: column 'room' is 700; .*domain; row 1 of a\.csv has it with domain video \(here live\)",
        ),
        (
            WITH_VISITS_OF_EVENTS,
            EVENT_LINES,
            f"2,10,100,{T0 + 9},like,,1",
            r"b\.csv: row 1: column 'visit' is 1; .*row 1 of a\.csv has it with user_id 1 \(here 2\)",
        ),
        (
            WITH_VISITS_OF_EVENTS,
            EVENT_LINES,
            f"1,10,101,{T0 + 9},like,,1",
            r"b\.csv: row 1: column 'visit' is 1; .*row 1 of a\.csv has it with item_id 100 \(here 101\)",
        ),
    ],
)
def test_ids_with_two_meanings_are_refused(tmp_path: Path, mapping: str, lines: str, more: str, message: str) -> None:
    arguments = write(tmp_path, mapping, lines)
    if more:
        (tmp_path / "log" / "b.csv").write_text(lines.splitlines()[0] + f"\n{more}\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        import_events(**arguments)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_good_visit_ids_are_kept(tmp_path: Path) -> None:
    assert import_events(**write(tmp_path / "exposures", WITH_VISITS, VISIT_LINES)).exposures == 3
    assert import_events(**write(tmp_path / "events", WITH_VISITS_OF_EVENTS, EVENT_LINES)).exposures == 1


def test_a_user_with_two_lines_is_named(tmp_path: Path) -> None:
    arguments = write(tmp_path, EXPOSURES, EXPOSURE_LINES, "uid,city,age\n7,Berlin,30\n8,,41.5\n7.0,Rome,2\n")
    with pytest.raises(UserError, match=r"users\.csv: row 3: column 'uid' is '7.0'; it must be unique: each user has"):
        import_events(**arguments)
