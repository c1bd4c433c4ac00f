"""Segments on air in a room at a time, and during a visit, with hindsight: for reports, never for features.

A segment is on air for ``SEGMENT_MS`` from its start, or until the next segment of its room starts. So at most one
segment of a room is on air at a time, and it is the one that ``SegmentIndex.on_air`` gives for the entry of a visit.
Features read that index, which answers as of a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from modules.compiled import compiled
from trainer.data.format.text_schema import SEGMENT_MS

NO_ROOM, BEFORE_FIRST, OFF_AIR = -1, -2, -3
"""Answers of :meth:`AirTime.at` without a segment: the room has none; its first one starts later; or the time is at the
end of a segment or later, and no other one has started."""


class Overlaps(NamedTuple):
    """Time that visits were in segments, ``[p]`` each, visit after visit and in order of time.

    Attributes:
        visit: int64, place of the visit.
        place: int64, place of the segment.
        ms: int64, 1 or more.
    """

    visit: np.ndarray
    place: np.ndarray
    ms: np.ndarray


class AirTime:
    """Times in which the segments of rooms were on air; answers are places in the arrays that it was made from.

    Args:
        item_id: ``[n]`` int64, rooms.
        start_ms: ``[n]`` int64. Of segments that start at once, the one with the largest place is on air.
    """

    def __init__(self, item_id: np.ndarray, start_ms: np.ndarray) -> None:
        self.order = np.lexsort((start_ms, item_id))
        """``[n]`` int64, places by room, then start, then place."""
        rooms, self._starts = item_id[self.order], start_ms[self.order].astype(np.int64)
        self._stops = self._starts + SEGMENT_MS
        followed = np.flatnonzero(rooms[1:] == rooms[:-1])
        self._stops[followed] = np.minimum(self._stops[followed], self._starts[followed + 1])
        self._rooms, first = np.unique(rooms, return_index=True)
        self._bounds = np.append(first, len(rooms)).astype(np.int64)

    def at(self, item_id: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
        """Return the place of the segment on air, ``[m]`` int64.

        Without one the answer is ``NO_ROOM``, ``BEFORE_FIRST`` or ``OFF_AIR``.

        Args:
            item_id: ``[m]`` int64, rooms.
            time_ms: ``[m]`` int64. A segment's start is inside, its end is not.
        """
        found = np.empty(len(item_id), np.int64)
        _find(self._rooms, self._bounds, self._starts, self._stops, _whole(item_id), _whole(time_ms), found)
        some = found >= 0
        found[some] = self.order[found[some]]
        return found

    def overlaps(self, item_id: np.ndarray, begin_ms: np.ndarray, end_ms: np.ndarray) -> Overlaps:
        """Return the segments that were on air in each visit ``[begin_ms, end_ms)``, and for how long.

        Args:
            item_id: ``[m]`` int64, rooms.
            begin_ms, end_ms: ``[m]`` int64.
        """
        visits = (_whole(item_id), _whole(begin_ms), _whole(end_ms))
        index = (self._rooms, self._bounds, self._starts, self._stops)
        nothing = np.empty(0, np.int64)
        count = _overlap(*index, *visits, nothing, nothing, nothing)
        visit, place, ms = (np.empty(count, np.int64) for _ in range(3))
        _overlap(*index, *visits, visit, place, ms)
        return Overlaps(visit, self.order[place], ms)


def _whole(values: np.ndarray) -> np.ndarray:
    """Return values as contiguous int64, so that the loops are compiled for one type only."""
    return np.ascontiguousarray(values, np.int64)


@compiled("finding segments on air", nogil=True)
def _first_above(column: np.ndarray, first: int, stop: int, value: int) -> int:
    """Return the first place in ``[first, stop)`` whose value is above ``value``; ``stop`` if there is none."""
    while first < stop:
        middle = (first + stop) >> 1
        if column[middle] <= value:
            first = middle + 1
        else:
            stop = middle
    return first


@compiled("finding segments on air", nogil=True)
def _find(
    rooms: np.ndarray,
    bounds: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    wanted: np.ndarray,
    time_ms: np.ndarray,
    found: np.ndarray,
) -> None:
    """Write the place, in the order of rooms and starts, of the segment on air at each time; see ``AirTime.at``."""
    for row in range(len(wanted)):
        run = _first_above(rooms, 0, len(rooms), wanted[row]) - 1
        if run < 0 or rooms[run] != wanted[row]:
            found[row] = NO_ROOM
            continue
        place = _first_above(starts, bounds[run], bounds[run + 1], time_ms[row]) - 1
        if place < bounds[run]:
            found[row] = BEFORE_FIRST
        elif time_ms[row] >= stops[place]:
            found[row] = OFF_AIR
        else:
            found[row] = place


@compiled("finding segments on air", nogil=True)
def _overlap(
    rooms: np.ndarray,
    bounds: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    wanted: np.ndarray,
    begin_ms: np.ndarray,
    end_ms: np.ndarray,
    visit: np.ndarray,
    places: np.ndarray,
    ms: np.ndarray,
) -> int:
    """Return the number of overlaps, and write them if the arrays have room for them."""
    count = 0
    for row in range(len(wanted)):
        run = _first_above(rooms, 0, len(rooms), wanted[row]) - 1
        if run < 0 or rooms[run] != wanted[row]:
            continue
        # Starts rise in a room, and so do the ends, as no end is behind the next start.
        place = _first_above(stops, bounds[run], bounds[run + 1], begin_ms[row])
        while place < bounds[run + 1] and starts[place] < end_ms[row]:
            together = min(stops[place], end_ms[row]) - max(starts[place], begin_ms[row])
            if together > 0:
                if len(visit):
                    visit[count] = row
                    places[count] = place
                    ms[count] = together
                count += 1
            place += 1
    return count
