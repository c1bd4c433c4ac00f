"""SQLite's store of codes: files that are locked, full, damaged or not ours."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from trainer.console.errors import UserError
from trainer.semantic_ids.code_store import SegmentCodes, StoreSettings
from trainer.semantic_ids.sqlite_store import SqliteCodeStore

SETTINGS = StoreSettings("v1")


def segments(begin: int, end: int) -> SegmentCodes:
    number = np.arange(begin, end)
    return SegmentCodes(number % 5, number, (number % 7).astype(np.int32), 1000 * number)


def opened(path: Path, retry_seconds: float = 0.0) -> SqliteCodeStore:
    return SqliteCodeStore(str(path), SETTINGS, retry_seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = opened(tmp_path / "codes.sqlite")
    store.append(segments(0, 500))
    store.close()
    return tmp_path / "codes.sqlite"


def test_a_second_writer_waits_and_is_then_told(path: Path) -> None:
    store, other = opened(path), sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"codes.sqlite: another process writes it for too long; a store has one"):
        store.append(segments(500, 510))
    # A reader does not wait for the writer.
    assert store.recent(np.array([1]), np.array([10**6]), 3).counts.tolist() == [3]
    other.execute("ROLLBACK")
    assert store.append(segments(500, 510)).stored == 10
    store.close()
    other.close()


def test_a_signal_is_handled_while_another_writer_is_waited_for(path: Path) -> None:
    store, other = opened(path, retry_seconds=600), sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    before = signal.signal(signal.SIGUSR1, lambda number, frame: other.execute("ROLLBACK") and None)
    sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        sender.start()
        assert store.append(segments(500, 510)).stored == 10
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
        store.close()
        other.close()


def test_a_full_disk_leaves_what_was_there(path: Path) -> None:
    store = opened(path)
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(UserError, match=r"codes.sqlite: database or disk is full"):
        store.append(segments(500, 50_000))
    assert store.append(segments(0, 500)).repeated == 500
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert store.append(segments(490, 600)) == (100, 10, 0, 0)
    store.close()


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE settings (name TEXT)")
    connection.close()
    text = tmp_path / "text.sqlite"
    text.write_text("author,segment\n" * 500)
    for file, message in ((other, "no store of codes"), (text, "damaged, or no store"), (tmp_path, "not a file")):
        with pytest.raises(UserError, match=message):
            opened(file)
    with pytest.raises(UserError, match="unable to open"):
        opened(tmp_path / "absent" / "codes.sqlite")


def test_a_schema_with_a_trigger_or_a_view_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON segments BEGIN DELETE FROM segments; END")
    connection.close()
    with pytest.raises(UserError, match="no store of codes"):
        opened(path)


@pytest.mark.parametrize("format_", [2, "1", None])
def test_another_format_is_refused(format_: object, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE settings SET value = ? WHERE name = 'format'", (format_,))
    connection.close()
    with pytest.raises(UserError, match="another format; this version reads format 1"):
        opened(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_is_named_or_read_as_it_was(seed: int, path: Path) -> None:
    """SQLite has no checksums: damage of its structure is found; damage of a number in a page is not."""
    random = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    if seed % 2:
        del content[int(random.integers(1, len(content))) :]
    else:
        begin = int(random.integers(0, len(content) - 512))
        content[begin : begin + 512] = bytes(512)
    path.write_bytes(content)
    try:
        store = opened(path)
        found = store.recent(np.arange(5), np.full(5, 10**6), 300)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(found.code) == found.counts.sum()
        store.close()
