"""Store of recent codes in one SQLite file: the embedded default.

One process writes and many read, in WAL mode, so that they do not wait for each other. A call of
:meth:`SqliteCodeStore.append` is one transaction. A file from elsewhere is opened with its schema untrusted, and
refused if it is not ours.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.semantic_ids.code_store import (
    AppendCounts,
    RecentRuns,
    SegmentCodes,
    StoreSettings,
    check_runs,
    latest_runs,
    removable,
    removed_message,
)

FORMAT = 1
READ_ROWS = 256
"""Rows of a read transaction: a longer one would keep the write-ahead log from being emptied."""

WAIT_SECONDS = 0.2
"""Longest wait for another writer inside of SQLite."""
PAUSE_SECONDS = 0.005

_TABLES = {
    "settings": "CREATE TABLE settings (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "segments": "CREATE TABLE segments (author INTEGER, segment INTEGER, known_ms INTEGER, code INTEGER, "
    "PRIMARY KEY (author, segment)) WITHOUT ROWID",
    "by_time": "CREATE INDEX by_time ON segments (author, known_ms, segment, code)",
    "authors": "CREATE TABLE authors (author INTEGER PRIMARY KEY, removed_ms INTEGER, unchecked INTEGER)",
}
"""``authors``: latest time of a removed segment, -1 if there is none, and segments appended since the last check."""

_INCOMING = "CREATE TEMP TABLE incoming (author INTEGER, segment INTEGER, known_ms INTEGER, code INTEGER)"
_LATEST = (
    "SELECT known_ms, code FROM segments INDEXED BY by_time WHERE author = ? AND known_ms <= ? "
    "ORDER BY known_ms DESC, segment DESC LIMIT ?"
)


class SqliteCodeStore:
    """See :class:`trainer.semantic_ids.code_store.CodeStore`.

    Args:
        place: path of the file; its directory must exist.
        settings: must be those of the file if it is there.
        retry_seconds: longest time to wait for another writer.

    Raises:
        UserError: the file cannot be opened or written, is no store of codes, or has other settings.
    """

    def __init__(self, place: str, settings: StoreSettings, retry_seconds: float) -> None:
        self._place, self._settings, self._retry_seconds = place, settings, retry_seconds
        path = Path(place)
        if path.exists() and not path.is_file():
            raise UserError(f"{place}: not a file; name an SQLite file of codes, or a new one")
        with self._errors():
            self._connection = sqlite3.connect(place, timeout=retry_seconds, isolation_level=None)
        try:
            with self._errors():
                self._open(settings)
        except BaseException:
            self._connection.close()
            raise

    def append(self, codes: SegmentCodes) -> AppendCounts:
        """Add segments, see :meth:`trainer.semantic_ids.code_store.CodeStore.append`."""
        columns = (codes.author, codes.segment, codes.known_ms, codes.code)
        execute = self._connection.execute
        with self._errors(), self._transaction("BEGIN IMMEDIATE"):
            execute("DELETE FROM temp.incoming")
            self._connection.executemany(
                "INSERT INTO temp.incoming VALUES (?, ?, ?, ?)",
                zip(*(column.tolist() for column in columns), strict=True),
            )
            late = execute(
                "DELETE FROM temp.incoming WHERE known_ms <= "
                "(SELECT removed_ms FROM authors WHERE authors.author = incoming.author)"
            ).rowcount
            # The first of equal segments of a call is stored.
            stored = execute(
                "INSERT OR IGNORE INTO segments SELECT author, segment, known_ms, code FROM temp.incoming "
                "ORDER BY author, segment, rowid"
            ).rowcount
            there = len(codes.code) - late - stored
            conflicting = 0
            if there:
                (conflicting,) = execute(
                    "SELECT count(*) FROM temp.incoming AS new JOIN segments AS old USING (author, segment) "
                    "WHERE new.known_ms <> old.known_ms OR new.code <> old.code"
                ).fetchone()
            execute(
                "INSERT INTO authors SELECT author, -1, count(*) FROM temp.incoming WHERE true GROUP BY author "
                "ON CONFLICT (author) DO UPDATE SET unchecked = unchecked + excluded.unchecked"
            )
            self._remove_old()
        return AppendCounts(stored, there - conflicting, conflicting, late)

    def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RecentRuns:
        """Return the latest runs, see :meth:`trainer.semantic_ids.code_store.CodeStore.recent`."""
        check_runs(self._place, runs, self._settings)
        counts, segments = [], []
        for begin in range(0, len(authors), READ_ROWS):
            rows = slice(begin, begin + READ_ROWS)
            with self._errors(), self._transaction("BEGIN"):
                for author, as_of in zip(authors[rows].tolist(), as_of_ms[rows].tolist(), strict=True):
                    visible = self._visible(author, as_of, runs)
                    counts.append(len(visible))
                    segments += visible
        known_ms, code = np.array(segments, np.int64).reshape(-1, 2).T
        return latest_runs(np.array(counts, np.int64), known_ms, code, runs, self._settings.gap_ms)[0]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _visible(self, author: int, as_of_ms: int, runs: int) -> list[tuple[int, int]]:
        """Return times and codes of the latest visible segments, in order, as many as the answer needs."""
        limit = runs + 8 + runs // 8
        while True:
            found = self._connection.execute(_LATEST, (author, as_of_ms, limit)).fetchall()
            found.reverse()
            if len(found) <= runs:
                enough = False
            else:
                known_ms, code = np.array(found, np.int64).T
                enough = bool(latest_runs(np.array([len(found)]), known_ms, code, runs, self._settings.gap_ms)[1][0])
            if not enough and len(found) < limit:
                removed = self._connection.execute("SELECT removed_ms FROM authors WHERE author = ?", (author,))
                if (removed.fetchone() or (-1,))[0] >= 0:
                    raise UserError(removed_message(self._place, author, as_of_ms, runs))
                return found
            if enough:
                return found
            limit *= 4

    def _remove_old(self) -> None:
        """Remove what is beyond the bounds, of the authors with many new segments."""
        execute = self._connection.execute
        many = execute("SELECT author FROM authors WHERE unchecked >= ?", (max(1, self._settings.runs_kept // 4),))
        for (author,) in many.fetchall():
            rows = execute(
                "SELECT known_ms, code FROM segments INDEXED BY by_time WHERE author = ? ORDER BY known_ms, segment",
                (author,),
            ).fetchall()
            known_ms, code = np.array(rows, np.int64).T
            beyond = removable(known_ms, code, self._settings)
            removed_ms = -1
            if beyond:
                removed_ms = int(known_ms[beyond - 1])
                execute("DELETE FROM segments WHERE author = ? AND known_ms <= ?", (author, removed_ms))
            execute(
                "UPDATE authors SET unchecked = 0, removed_ms = max(removed_ms, ?) WHERE author = ?",
                (removed_ms, author),
            )

    def _open(self, settings: StoreSettings) -> None:
        execute = self._connection.execute
        execute("PRAGMA trusted_schema = OFF")
        execute("PRAGMA cell_size_check = ON")
        execute("PRAGMA temp_store = MEMORY")
        execute("PRAGMA journal_mode = WAL")
        # A crash of the machine may lose the last calls, never the file; a writer repeats what it does not know.
        execute("PRAGMA synchronous = NORMAL")
        with self._transaction("BEGIN IMMEDIATE"):
            found = dict(execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall())
            if not found:
                for statement in _TABLES.values():
                    execute(statement)
                values = {"format": FORMAT, **settings._asdict()}
                self._connection.executemany("INSERT INTO settings VALUES (?, ?)", values.items())
            elif found != _TABLES:
                raise UserError(f"{self._place}: an SQLite file, but no store of codes; name a new file")
            stored = dict(execute("SELECT name, value FROM settings").fetchall())
        if stored.pop("format", None) != FORMAT or set(stored) != set(StoreSettings._fields):
            raise UserError(f"{self._place}: a store of codes of another format; this version reads format {FORMAT}")
        settings.check(StoreSettings(**stored), self._place)
        execute(_INCOMING)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        """Run the block in a transaction, which an exception rolls back."""
        if begin == "BEGIN":
            self._connection.execute(begin)
        else:
            self._begin_to_write(begin)
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _begin_to_write(self, statement: str) -> None:
        """Begin a transaction; another writer is waited for in short steps, between which Python handles signals."""
        execute = self._connection.execute
        until = time.monotonic() + self._retry_seconds
        execute(f"PRAGMA busy_timeout = {1000 * min(WAIT_SECONDS, self._retry_seconds):.0f}")
        try:
            while True:
                try:
                    execute(statement)
                    return
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() >= until:
                        raise
                    # Some locks are refused without a wait.
                    time.sleep(PAUSE_SECONDS)
        finally:
            execute(f"PRAGMA busy_timeout = {1000 * self._retry_seconds:.0f}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn an error of SQLite into one line that names the file."""
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error)
            if "locked" in reason:
                reason = "another process writes it for too long; a store has one writer"
            elif isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                reason = f"damaged, or no store of codes: {reason}"
            raise UserError(f"{self._place}: {reason}") from None
