"""Growing files of JSON lines: every line once, from any position, whatever happens to the files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.semantic_ids.follow_parts import ManualClock, lines_of, message
from trainer.console.errors import UserError
from trainer.semantic_ids import segment_source_lines
from trainer.semantic_ids.segment_source_lines import LineSource


def open_lines(path: Path, position: dict[str, Any] | None = None, until_end: bool = False) -> LineSource:
    # As it comes back from the cache.
    return LineSource(path, json.loads(json.dumps(position or {})), ManualClock(), until_end=until_end)


def ids(source: LineSource, limit: int = 100) -> list[tuple[int, int]]:
    return [(one.item_id, one.segment) for one in source.take(limit, 0).segments]


@given(st.data())
def test_every_line_is_read_once_from_any_position(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    written: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    rejected = 0
    pending = {name: b"" for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    source, position = open_lines(folder), {}
    for step in range(data.draw(st.integers(1, 8))):
        for name in pending:
            room = ord(name[0])
            for number in range(data.draw(st.integers(0, 3))):
                written.append((room, 10 * step + number))
                pending[name] += lines_of([message(room, 10 * step + number)]) + b"\n"
            # A line may be in parts, and a bad one between.
            cut = data.draw(st.integers(0, len(pending[name])))
            with open(folder / name, "ab") as file:
                file.write(pending[name][:cut])
            pending[name] = pending[name][cut:]
        batch = source.take(data.draw(st.integers(1, 5)), 0)
        read += [(one.item_id, one.segment) for one in batch.segments]
        rejected += len(batch.rejected)
        position = batch.position or position
        if data.draw(st.booleans()):
            source = open_lines(folder, position)
    for name, rest in pending.items():
        with open(folder / name, "ab") as file:
            file.write(rest)
    while batch := source.take(3, 0):
        read += [(one.item_id, one.segment) for one in batch.segments]
    assert sorted(read) == sorted(written) and not rejected
    for room in {room for room, _ in written}:
        assert [one for one in read if one[0] == room] == [one for one in written if one[0] == room]


def test_a_line_is_read_when_its_end_is_there(tmp_path: Path) -> None:
    file = tmp_path / "rooms.jsonl"
    line = lines_of([message(1, 0)])
    file.write_bytes(line + line[:-1].replace(b'"segment": 0', b'"segment": 1'))
    source = open_lines(file)
    assert ids(source) == [(1, 0)] and ids(source) == []
    with open(file, "ab") as opened:
        opened.write(b"\n")
    assert ids(source) == [(1, 1)]


def test_until_the_end_the_last_line_needs_no_line_break(tmp_path: Path) -> None:
    file = tmp_path / "rooms.jsonl"
    file.write_bytes(lines_of([message(1, 0), message(1, 1)])[:-1])
    source = open_lines(file, until_end=True)
    assert ids(source) == [(1, 0), (1, 1)] and not source.finished
    assert ids(source) == [] and source.finished


def test_a_bad_line_is_rejected_with_its_place(tmp_path: Path) -> None:
    good = lines_of([message(1, 0)])
    (tmp_path / "rooms.jsonl").write_bytes(good + b"nonsense\n\n  \n" + good)
    batch = open_lines(tmp_path).take(10, 0)
    assert [one.place for one in batch.segments] == ["rooms.jsonl:0", f"rooms.jsonl:{len(good) + 13}"]
    (bad,) = batch.rejected
    assert (bad.place, bad.reason, bad.content) == (f"rooms.jsonl:{len(good)}", "not valid JSON", b"nonsense")


def test_a_line_that_is_too_long_is_skipped_and_its_beginning_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_source_lines, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(segment_source_lines, "READ_CHUNK", 64)
    monkeypatch.setattr(segment_source_lines, "KEPT_BYTES", 20)
    file = tmp_path / "rooms.jsonl"
    good = lines_of([message(1, 0)])
    file.write_bytes(b"x" * 5000)
    source = open_lines(file)
    batch = source.take(10, 0)
    assert not batch and not batch.position
    with open(file, "ab") as opened:
        opened.write(b"yyy\n" + good)
    batch = source.take(10, 0)
    (bad,) = batch.rejected
    assert bad.reason == "longer than 200 bytes" and bad.content == b"x" * 20
    assert [one.segment for one in batch.segments] == [0]
    assert not open_lines(file, batch.position).take(10, 0)


@pytest.mark.parametrize("replaced", ["rewritten", "emptied", "moved"])
def test_a_file_that_was_replaced_is_read_from_its_beginning(tmp_path: Path, replaced: str) -> None:
    file = tmp_path / "rooms.jsonl"
    file.write_bytes(lines_of([message(1, number) for number in range(9)]))
    for reopened in (False, True):
        source = open_lines(file)
        batch = source.take(100, 0)
        if reopened:
            source = open_lines(file, batch.position)
        new = lines_of([message(2 + reopened, 0)])
        if replaced == "rewritten":
            # Longer than before, and the same file.
            new += lines_of([message(2 + reopened, number) for number in range(1, 30)])
            file.write_bytes(new)
        elif replaced == "emptied":
            os.truncate(file, 0)
            assert ids(source) == []
            file.write_bytes(new)
        else:
            (tmp_path / "new").write_bytes(new)
            os.replace(tmp_path / "new", file)
        assert ids(source)[0] == (2 + reopened, 0)


def test_files_of_a_folder_are_read_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([message(1, number) for number in range(50)]))
    (tmp_path / "b.jsonl").write_bytes(lines_of([message(2, number) for number in range(5)]))
    (tmp_path / "notes.txt").write_text("no segments")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe")
    source = open_lines(tmp_path)
    assert {room for room, _ in ids(source, 6)} == {1, 2}
    (tmp_path / "c.jsonl").write_bytes(lines_of([message(3, 0)]))
    assert (3, 0) in ids(source, 6)
    (tmp_path / "a.jsonl").unlink()
    while batch := source.take(6, 0):
        assert {one.item_id for one in batch.segments} <= {1, 2}
    assert "a.jsonl" not in source.take(6, 0).position


def test_a_fifo_and_a_missing_path_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="not a regular file but a FIFO"):
        open_lines(tmp_path).take(1, 0)
    with pytest.raises(UserError, match="no such file or folder; make it before it is followed"):
        open_lines(tmp_path / "nowhere")


def test_waiting_ends_with_the_timeout(tmp_path: Path) -> None:
    clock = ManualClock()
    source = LineSource(tmp_path, {}, clock)
    before = clock.now
    assert not source.take(5, 0.35)
    assert clock.now == pytest.approx(before + 0.35)


def test_many_files_hold_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was away finds much in the file of every room; it must not have all of it in memory."""
    monkeypatch.setattr(segment_source_lines, "HELD_BYTES", 20_000)
    monkeypatch.setattr(segment_source_lines, "SMALLEST_READ", 64)
    for room in range(40):
        lines = lines_of([message(room, number) for number in range(100)])
        (tmp_path / f"{room}.jsonl").write_bytes(lines)
    source, taken = LineSource(tmp_path, {}, ManualClock(), until_end=True), []
    while not source.finished:
        taken += source.take(16, 0.0).segments
        # Beside them, each file may hold the line that its chunk has cut.
        assert sum(len(file._held) for file in source._files.values()) <= 20_000 + 40 * 200
    assert len({one.id for one in taken}) == len(taken) == 4000
