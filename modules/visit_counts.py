"""Counts of a user's past visits and of their behaviours, as of a time for each row, with older visits counting less.

A visit that ended ``age`` milliseconds before the time of a row counts ``2^(-age / half_life)``, or 1 without a half
life. Weights are rounded to multiples of 2^-20, and sums of them are integers. So a count is the same in every order of
the visits; a visit that is older than 21 half lives counts nothing.

Histories are runs of flat columns in order of the visits' ends, as for the searches of ``modules/search/search.py``.
"""

from __future__ import annotations

import numpy as np

from modules.compiled import compiled
from modules.threads import each_part

UNIT = 1 << 20
"""Integer weight of a visit that counts as 1."""

OLDEST = 21
"""Half lives after which a visit counts nothing: 2^-21 is the smallest weight that is not rounded to 0."""


def count_visits(
    first: np.ndarray,
    stop: np.ndarray,
    as_of_ms: np.ndarray,
    known_ms: np.ndarray,
    bits: np.ndarray,
    behaviours: int,
    half_life_ms: float = 0.0,
    column: np.ndarray | None = None,
    candidate: np.ndarray | None = None,
) -> np.ndarray:
    """Return the counts of visits and of their behaviours for n rows, ``[n, 1 + behaviours]`` float32.

    Args:
        first: ``[n, runs]`` int64, first place of each run of a row.
        stop: ``[n, runs]`` int64, place after the last one of each run.
        as_of_ms: ``[n]`` int64, time of each row; later than the ends of all visits of its runs.
        known_ms: column of the history, int64: ends of the visits, which rise in each run.
        bits: column of the history, int32: bit k is set if behaviour k happened.
        behaviours: number of behaviours to count, at most 31.
        half_life_ms: time in which the weight of a visit falls by half; 0 for no fall.
        column: column of the history that must have the value ``candidate [n]`` of the same type; None: all visits.
        candidate: see ``column``.
    """
    matches = column is not None
    if column is None or candidate is None:
        column, candidate = known_ms, as_of_ms
    out = np.zeros((len(first), 1 + behaviours), np.int64)
    # One kind of argument is one compilation: stored columns are read-only, copies of them are not.
    runs = _read_only(first), _read_only(stop), _read_only(as_of_ms)
    columns = _read_only(known_ms), _read_only(bits), _read_only(column), _read_only(candidate)

    def part(begin: int, end: int) -> None:
        _add_visits(begin, end, *runs, *columns, matches, float(half_life_ms), out)

    each_part(part, len(first))
    return (out / UNIT).astype(np.float32)


def _read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


@compiled("counting past visits", nogil=True)
def _add_visits(
    begin: int,
    end: int,
    first: np.ndarray,
    stop: np.ndarray,
    as_of_ms: np.ndarray,
    known_ms: np.ndarray,
    bits: np.ndarray,
    column: np.ndarray,
    candidate: np.ndarray,
    matches: bool,
    half_life_ms: float,
    out: np.ndarray,
) -> None:
    """Add the integer weights of the visits of the rows ``[begin, end)`` to ``out``."""
    kept = (1 << (out.shape[1] - 1)) - 1
    for row in range(begin, end):
        for run in range(first.shape[1]):
            for at in range(stop[row, run] - 1, first[row, run] - 1, -1):
                age = as_of_ms[row] - known_ms[at]
                # The visits before this one are older still.
                if half_life_ms > 0 and age > OLDEST * half_life_ms:
                    break
                if matches and column[at] != candidate[row]:
                    continue
                weight = UNIT
                if half_life_ms > 0:
                    weight = int(UNIT * 2.0 ** (-age / half_life_ms) + 0.5)
                out[row, 0] += weight
                left, place = bits[at] & kept, 1
                while left:
                    if left & 1:
                        out[row, place] += weight
                    left >>= 1
                    place += 1
