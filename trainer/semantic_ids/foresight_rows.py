"""Rows of Foresight: what was known of an author when a segment became known, and the code that its room showed next.

A row is a segment of a room after which another one came. Its time ``as_of_ms`` is the segment's ``known_ms``. Its
context is the author's latest runs as of that time, as a store of recent codes answers; a test compares them with
``code_features.run_features`` bit for bit. Its target is a code that became known later:

* ``next``: the code of the room's next segment, from the uncompressed stream. Only then can the rule "the last code
  again" be right, which the paper's table 3 has at 8 %.
* ``change``: the next code of the room that differs from that of the segment.

Rules for segments that are out of order, or missing:

* Segments of a room are in the order of ``known_ms``, then of their id, as in the store. The next segment is the next
  one to become known, even if it was on air earlier.
* Segments of a room that become known at the same time make one row, that of the last of them: the code of any other
  is known at its time.
* A pause of more than five minutes ends a stretch of segments, and the last segment before it has no row.
* Segments of unknown authors have no rows, and are counted.

A forecast needs no target: :class:`SegmentContexts` has the context of every segment of a known author, also of the
newest one of a room.

A row is trained on if its target was known before the end of the training range, and evaluated if its own time is in
the range of evaluation. So the rows in between are neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from trainer.data.format.segments import UNKNOWN_AUTHOR
from trainer.semantic_ids.code_features import NO_CODE
from trainer.semantic_ids.code_store import GAP_MS, run_starts
from trainer.semantic_ids.segments import TimeRange

Target = Literal["next", "change"]


class Contexts(NamedTuple):
    """Runs of n rows as of their times, the newest run last; free places are at the front.

    Attributes:
        code: ``[n, runs] int32``, ``NO_CODE`` at a free place.
        length: ``[n, runs] int32``, number of segments; 0 at a free place.
    """

    code: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class SegmentContexts:
    """Segments in the order in which they became known, and the runs from which their contexts are cut.

    Attributes:
        segment: ``[n] int64``, place of the segment in the arrays from which these were made.
        author: ``[n] int64``.
        as_of_ms: ``[n] int64``, time of the context: the segment's ``known_ms``.
    """

    segment: np.ndarray
    author: np.ndarray
    as_of_ms: np.ndarray
    _runs: _Runs
    # [n, 3] int64: first run of the author, run after the last visible one, end of the visible segments.
    _cuts: np.ndarray

    def __len__(self) -> int:
        return len(self.author)

    @staticmethod
    def of_all(
        author_id: np.ndarray, segment: np.ndarray, known_ms: np.ndarray, code: np.ndarray, gap_ms: int = GAP_MS
    ) -> SegmentContexts:
        """Return all segments of known authors; the arguments are those of :meth:`ForesightRows.make`."""
        here = np.lexsort((segment, known_ms))
        here = here[author_id[here] != UNKNOWN_AUTHOR]
        runs = _Runs.by_author(author_id, segment, known_ms, code, gap_ms)
        cuts = runs.cuts(author_id[here], known_ms[here])
        return SegmentContexts(here, author_id[here], known_ms[here], runs, cuts)

    def contexts(self, rows: np.ndarray, runs: int) -> Contexts:
        """Return the author's latest runs as of the time of some rows ``[k]``."""
        _, last, end = self._cuts[rows].T
        place, there = self._places(rows, runs)
        code = np.where(there, self._runs.code[place], np.int32(NO_CODE))
        length = np.where(there, self._runs.length[place], np.int32(0))
        # The newest run has the length that it had at that time. A row has a segment, and so a run.
        length[:, -1] = end - self._runs.start[last - 1]
        return Contexts(code, length)

    def joined(self, rows: np.ndarray, runs: int) -> np.ndarray:
        """Return which runs of the contexts follow the run before them without a pause, ``[k, runs] bool``."""
        place, there = self._places(rows, runs)
        joined: np.ndarray = there & self._runs.joined[place]
        return joined

    def _places(self, rows: np.ndarray, runs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of each run of the contexts, 0 at a free place, and which places have one."""
        first, last, _ = self._cuts[rows].T
        place = last[:, None] + np.arange(-runs, 0)
        there = place >= first[:, None]
        return np.where(there, place, 0), there

    def run_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the author's runs as of the time of some rows, ``[k] int64``, without a bound."""
        first, last, _ = self._cuts[rows].T
        counts: np.ndarray = last - first
        return counts


@dataclass(frozen=True)
class ForesightRows(SegmentContexts):
    """Rows in the order of their times.

    Attributes:
        code: ``[n] int64``, code of the row's segment.
        target: ``[n] int64``, the code to foresee.
        target_ms: ``[n] int64``, time at which the target became known; above ``as_of_ms``.
        without_author: number of segments of unknown authors.
    """

    code: np.ndarray
    target: np.ndarray
    target_ms: np.ndarray
    without_author: int

    @staticmethod
    def make(
        author_id: np.ndarray,
        item_id: np.ndarray,
        segment: np.ndarray,
        known_ms: np.ndarray,
        code: np.ndarray,
        *,
        target: Target = "next",
        gap_ms: int = GAP_MS,
    ) -> ForesightRows:
        """Make the rows of segments in any order.

        Args:
            author_id, item_id, segment, known_ms: ``[m] int64``, as in a code file.
            code: ``[m]``, one number for each segment.
            target: code to foresee, see above.
            gap_ms: longest pause inside a run, and inside a stretch of a room.
        """
        known_author = author_id != UNKNOWN_AUTHOR
        order = np.lexsort((segment, known_ms, item_id))
        order = order[known_author[order]]
        here, later = _pairs(item_id[order], known_ms[order], code[order], target, gap_ms)
        here, later = order[here], order[later]
        by_time = np.lexsort((segment[here], known_ms[here]))
        here, later = here[by_time], later[by_time]

        runs = _Runs.by_author(author_id, segment, known_ms, code, gap_ms)
        return ForesightRows(
            segment=here,
            author=author_id[here],
            as_of_ms=known_ms[here],
            code=code[here].astype(np.int64),
            target=code[later].astype(np.int64),
            target_ms=known_ms[later],
            without_author=int((~known_author).sum()),
            _runs=runs,
            _cuts=runs.cuts(author_id[here], known_ms[here]),
        )

    def training(self, times: TimeRange) -> np.ndarray:
        """Return the rows ``[k] int64`` whose own time and target are in a range, in the order of time."""
        return np.flatnonzero((self.as_of_ms >= times.from_ms) & (self.target_ms < times.until_ms))

    def evaluation(self, times: TimeRange) -> np.ndarray:
        """Return the rows ``[k] int64`` whose own time is in a range, in the order of time."""
        return np.flatnonzero((self.as_of_ms >= times.from_ms) & (self.as_of_ms < times.until_ms))


class _Runs(NamedTuple):
    """Runs of all authors, author after author, in order.

    Attributes:
        code, length: ``[runs] int32``.
        start: ``[runs] int64``, place of the first segment.
        joined: ``[runs] bool``, the run follows the author's run before it without a pause.
        author, known_ms: ``[segments] int64``, by author, then in order.
    """

    code: np.ndarray
    length: np.ndarray
    start: np.ndarray
    joined: np.ndarray
    author: np.ndarray
    known_ms: np.ndarray

    @staticmethod
    def by_author(
        author_id: np.ndarray, segment: np.ndarray, known_ms: np.ndarray, code: np.ndarray, gap_ms: int
    ) -> _Runs:
        """Return the runs of the known authors, of segments in any order."""
        order = np.lexsort((segment, known_ms, author_id))
        order = order[author_id[order] != UNKNOWN_AUTHOR]
        author, known_ms, code = author_id[order], known_ms[order], code[order].astype(np.int32)
        start = run_starts(author, known_ms, code, gap_ms)
        length = np.diff(np.append(start, len(code))).astype(np.int32)
        before = np.maximum(start - 1, 0)
        joined = (start > 0) & (author[before] == author[start]) & (known_ms[start] - known_ms[before] <= gap_ms)
        return _Runs(code[start], length, start, joined, author, known_ms)

    def cuts(self, author: np.ndarray, as_of_ms: np.ndarray) -> np.ndarray:
        """Return ``[n, 3] int64``, see ``ForesightRows``."""
        begin = np.searchsorted(self.author, author)
        # Segments and requests in one order, requests after the segments of their time.
        order = np.lexsort(
            (
                np.repeat([0, 1], [len(self.author), len(author)]),
                np.concatenate([self.known_ms, as_of_ms]),
                np.concatenate([self.author, author]),
            )
        )
        is_segment = order < len(self.author)
        end = np.empty(len(author), np.int64)
        end[order[~is_segment] - len(self.author)] = np.cumsum(is_segment)[~is_segment]
        return np.stack([np.searchsorted(self.start, begin), np.searchsorted(self.start, end), end], axis=1)


def _pairs(
    item_id: np.ndarray, known_ms: np.ndarray, code: np.ndarray, target: Target, gap_ms: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the rows' segments and of their targets, of segments room after room in order."""
    count = len(item_id)
    if not count:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    joined = (item_id[1:] == item_id[:-1]) & (known_ms[1:] - known_ms[:-1] <= gap_ms)
    newer = known_ms[1:] > known_ms[:-1]
    later = np.arange(1, count + 1)
    if target == "change":
        # The next place with another code, or at which another stretch begins; the latter is no target.
        ends = np.append(~joined | (code[1:] != code[:-1]), True)
        place = np.where(ends, later, count)
        later = np.minimum.accumulate(place[::-1])[::-1]
    stretch = np.append(0, np.cumsum(~joined))
    here = np.flatnonzero(np.append(joined & newer, False))
    here = here[later[here] < count]
    here = here[stretch[later[here]] == stretch[here]]
    return here, later[here]
