"""Store of the codes that each author's rooms have shown, read as runs as of a time: the interface and its rules.

Every 30 seconds a segment of a room becomes known and has a code. Foresight (section 2.1, steps 3 and 10) reads an
author's last 100 runs: neighbouring segments with the same code, and their number. The rules, which
``trainer/semantic_ids/sqlite_store.py`` and ``trainer/semantic_ids/redis_store.py`` share:

* **Order.** Segments of an author are in the order of ``known_ms``, and of their id where that is equal. They may be
  appended in any order. A run ends where the code changes, or where the next segment becomes known more than ``gap_ms``
  later.
* **As of a time.** A read sees the segments with ``known_ms <= as_of_ms`` only. A run that goes on later has the length
  that it had then. So no later segment changes what was read, and a segment that is appended early is hidden until it
  is known.
* **Twice.** A segment that is there is not stored again: the first code and time stay. So a writer that does not know
  whether its last call arrived repeats it.
* **Bounds.** Of each author at least the latest ``runs_kept`` runs are kept, but no more than ``segments_kept``
  segments. Older segments are removed. A segment that is appended later and is not newer than a removed one is
  dropped. A read that would need a removed segment is refused, never answered short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from trainer.console.errors import UserError

RUNS_KEPT = 300
SEGMENTS_KEPT = 100_000
"""35 days of segments of 30 seconds."""
GAP_MS = 300_000
"""Five minutes: a room that ended and a later one of the author are two runs."""

ENTRY = np.dtype([("segment", "<i8"), ("known_ms", "<i8"), ("code", "<i4")])
"""One segment of an author."""


@dataclass(frozen=True)
class SegmentCodes:
    """Codes of n segments.

    Attributes:
        author: ``[n]`` int64.
        segment: ``[n]`` int64, ids, unique for an author.
        code: ``[n]`` int32, 0 or larger.
        known_ms: ``[n]`` int64, time from which the code is known, in milliseconds since 1970.

    Raises:
        ValueError: the arrays have different lengths, or a code or time is negative.
    """

    author: np.ndarray
    segment: np.ndarray
    code: np.ndarray
    known_ms: np.ndarray

    def __post_init__(self) -> None:
        if len({len(part) for part in (self.author, self.segment, self.code, self.known_ms)}) > 1:
            raise ValueError("author, segment, code and known_ms must have the same length")
        if len(self.code) and (self.code.min() < 0 or self.known_ms.min() < 0):
            raise ValueError("codes and times must not be negative")


class AppendCounts(NamedTuple):
    """Numbers of the segments of a call by what was done with them; they add up to all of them.

    Attributes:
        stored: new segments.
        repeated: were there already, with the same code and time.
        conflicting: were there already with another code or time, which stays.
        late: dropped, since newer segments of the author have been removed already.
    """

    stored: int
    repeated: int
    conflicting: int
    late: int

    def __add__(self, other: AppendCounts) -> AppendCounts:  # type: ignore[override]
        """Add two counts, field by field."""
        return AppendCounts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class RecentRuns:
    """Runs of n rows, row after row, the oldest run of each row first.

    Attributes:
        counts: ``[n]`` int64, runs of each row; 0 for an author without a segment.
        code: ``[counts.sum()]`` int32.
        length: ``[counts.sum()]`` int64, number of segments, as of the row's time.
        first_ms, last_ms: ``[counts.sum()]`` int64, ``known_ms`` of the first and of the last segment.
    """

    counts: np.ndarray
    code: np.ndarray
    length: np.ndarray
    first_ms: np.ndarray
    last_ms: np.ndarray


class CodeStore(Protocol):
    """Codes of one codebook version, by author."""

    def append(self, codes: SegmentCodes) -> AppendCounts:
        """Add segments; all of them are stored when the call returns.

        Raises:
            UserError: the store cannot be written.
        """
        ...

    def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RecentRuns:
        """Return the latest runs of each author as of a time.

        Args:
            authors: ``[n]`` int64.
            as_of_ms: ``[n]`` int64.
            runs: largest number of runs of a row.

        Raises:
            UserError: the store cannot be read, ``runs`` is above ``runs_kept``, or an answer needs removed segments.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class StoreSettings(NamedTuple):
    """Settings that a store keeps from its first use on.

    Attributes:
        version: name of the codebook version whose codes are stored.
        runs_kept, segments_kept, gap_ms: see the module's rules.
    """

    version: str
    runs_kept: int = RUNS_KEPT
    segments_kept: int = SEGMENTS_KEPT
    gap_ms: int = GAP_MS

    def check(self, stored: StoreSettings, place: str) -> None:
        """Compare the settings with those of a store.

        Raises:
            UserError: they differ.
        """
        for name, expected, found in zip(self._fields, self, stored, strict=True):
            if found != expected:
                what = "codes of the codebook" if name == "version" else name
                raise UserError(
                    f"{place}: has {what} {found!r}, not {expected!r}; name another store, or use what it has"
                )


def run_starts(row: np.ndarray, known_ms: np.ndarray, code: np.ndarray, gap_ms: int) -> np.ndarray:
    """Return the places ``[runs]`` int64 at which runs begin, of the segments of several rows in order.

    Args:
        row: ``[n]`` int64, row of each segment, ascending.
        known_ms: ``[n]`` int64, ascending in a row.
        code: ``[n]`` int32.
        gap_ms: see the module's rules.
    """
    begins = np.ones(len(code), bool)
    begins[1:] = (row[1:] != row[:-1]) | (code[1:] != code[:-1]) | (known_ms[1:] - known_ms[:-1] > gap_ms)
    return np.flatnonzero(begins)


def removable(known_ms: np.ndarray, code: np.ndarray, settings: StoreSettings) -> int:
    """Return how many of the oldest of one author's segments, in order, are beyond the bounds of a store.

    One run more than ``runs_kept`` stays: only the segment before a run shows where the run begins.
    """
    starts = run_starts(np.zeros(len(code), np.int64), known_ms, code, settings.gap_ms)
    beyond = int(starts[-settings.runs_kept - 1]) if len(starts) > settings.runs_kept + 1 else 0
    beyond = max(beyond, len(code) - settings.segments_kept)
    # Segments of one time go together: a removed one would otherwise make an equally old one late.
    while 0 < beyond < len(code) and known_ms[beyond] == known_ms[beyond - 1]:
        beyond -= 1
    return beyond


def latest_runs(
    counts: np.ndarray, known_ms: np.ndarray, code: np.ndarray, runs: int, gap_ms: int
) -> tuple[RecentRuns, np.ndarray]:
    """Return the latest runs of each of n rows, and whether they are known to begin there.

    Args:
        counts: ``[n]`` int64, visible segments of each row.
        known_ms: ``[counts.sum()]`` int64, row after row, in the rows in order.
        code: ``[counts.sum()]`` int32.
        runs: largest number of runs of a row.
        gap_ms: see the module's rules.

    Returns:
        The runs, and ``[n]`` bool: more runs than asked for were there, so that no older segment can change the answer.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    starts = run_starts(row, known_ms, code, gap_ms)
    ends = np.append(starts[1:], len(code))
    in_row = np.bincount(row[starts], minlength=len(counts))
    kept = np.cumsum(in_row)[row[starts]] - np.arange(len(starts)) <= runs
    starts, ends = starts[kept], ends[kept]
    found = RecentRuns(
        np.minimum(in_row, runs), code[starts].astype(np.int32), ends - starts, known_ms[starts], known_ms[ends - 1]
    )
    return found, in_row > runs


def removed_message(place: str, author: int, as_of_ms: int, runs: int) -> str:
    """Return the message for a read that needs removed segments."""
    return (
        f"{place}: author {author} as of {as_of_ms}: the last {runs} runs need segments that are no longer kept; "
        "read a later time, or keep more (runs_kept, segments_kept)"
    )


def check_runs(place: str, runs: int, settings: StoreSettings) -> None:
    """Check how many runs are asked for.

    Raises:
        UserError: the store does not keep so many.
    """
    if not 0 < runs <= settings.runs_kept:
        raise UserError(f"{place}: {runs} runs of an author are asked for; the store keeps 1 to {settings.runs_kept}")
