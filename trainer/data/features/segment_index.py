"""Segments by author and by room, read as of a time.

Every read takes a time and answers from the segments with ``known_ms <= as_of_ms`` only. So changing, adding or
removing a segment that becomes known later changes no answer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from modules.compiled import compiled
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS
from trainer.data.format.text_schema import SEGMENT_MS

NO_SEGMENT = -1
_NEVER = (1 << 63) - 1
"""Time after all others."""

_LIVE = DOMAINS.index("live")

OnAir = Literal["entry", "longest"]
"""Choice among the segments of a visit: the one on air when it began, or the one that was watched longest."""


class SegmentChanges(NamedTuple):
    """Segments that were on air in n visits, for every time from which they are asked for.

    Attributes:
        counts: ``[n]`` int64, number of changes of each visit; 0 if it never has a segment.
        since_ms: ``[counts.sum()]`` int64, time from which a change holds, rising for each visit.
        places: ``[counts.sum()]`` int64, place of the segment from then on. Before the first change there is none.
    """

    counts: np.ndarray
    since_ms: np.ndarray
    places: np.ndarray


class SegmentIndex:
    """Segments by author and by room, read as of a time; answers are places in the arrays that it was made from.

    A segment is on air for ``SEGMENT_MS`` from its start. Author -1 is unknown: it has no segments.

    Args:
        author_id: ``[n]`` int64.
        item_id: ``[n]`` int64, rooms.
        start_ms: ``[n]`` int64.
        known_ms: ``[n]`` int64.

    Attributes:
        order: ``[n]`` int64, places by author, then ``known_ms``, then place.
    """

    def __init__(self, author_id: np.ndarray, item_id: np.ndarray, start_ms: np.ndarray, known_ms: np.ndarray) -> None:
        # lexsort is stable: equal keys keep the order of their places.
        self.order = np.lexsort((known_ms, author_id))
        self._known_by_author = known_ms[self.order]
        self._authors, self._author_bounds = _runs(author_id[self.order])
        self._in_room = np.lexsort((start_ms, item_id))
        self._starts, self._known_in_room = start_ms[self._in_room], known_ms[self._in_room]
        self._rooms, self._room_bounds = _runs(item_id[self._in_room])

    def __len__(self) -> int:
        return len(self.order)

    def latest(self, authors: np.ndarray, as_of_ms: np.ndarray) -> np.ndarray:
        """Return the place of each author's latest segment, ``[m]`` int64; -1 without a known segment.

        It is the segment with the largest (``known_ms``, place) of those with ``known_ms <= as_of_ms``.

        Args:
            authors: ``[m]`` int64.
            as_of_ms: ``[m]`` int64.
        """
        first, stop = self.span(authors, as_of_ms)
        places = np.full(len(authors), NO_SEGMENT)
        some = stop > first
        places[some] = self.order[stop[some] - 1]
        return places

    def counts(self, authors: np.ndarray, as_of_ms: np.ndarray) -> np.ndarray:
        """Return the number of each author's known segments, ``[m]`` int64; the arguments are those of ``latest``."""
        first, stop = self.span(authors, as_of_ms)
        return stop - first

    def span(self, authors: np.ndarray, as_of_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the known segments of each author as ``[first, stop)`` in ``order``, ``[m]`` int64 each.

        The span is empty for an unknown author. The arguments are those of :meth:`latest`.
        """
        first, stop = (np.empty(len(authors), np.int64) for _ in range(2))
        _spans(
            self._authors, self._author_bounds, self._known_by_author, _whole(authors), _whole(as_of_ms), first, stop
        )
        return first, stop

    def on_air(
        self, item_id: np.ndarray, begin_ms: np.ndarray, end_ms: np.ndarray, as_of_ms: np.ndarray, choice: OnAir
    ) -> np.ndarray:
        """Return the place of a segment of each room that was on air during a visit, ``[m]`` int64; -1 without one.

        Only segments with ``known_ms <= as_of_ms`` are considered.

        Args:
            item_id: ``[m]`` int64, rooms.
            begin_ms, end_ms: ``[m]`` int64, the visit.
            as_of_ms: ``[m]`` int64.
            choice: ``entry``: the segment on air at ``begin_ms``, of several the one that started last, then the one
                with the largest place. ``longest``: the segment with the largest overlap with ``[begin_ms, end_ms)``,
                of several the one that started first, then the one with the smallest place.
        """
        places = np.empty(len(item_id), np.int64)
        _on_air(
            self._rooms,
            self._room_bounds,
            self._starts,
            self._known_in_room,
            _whole(item_id),
            _whole(begin_ms),
            _whole(end_ms),
            _whole(as_of_ms),
            choice == "longest",
            SEGMENT_MS,
            places,
        )
        some = places >= 0
        places[some] = self._in_room[places[some]]
        return places

    def watched(self, visits: HistorySlice, as_of_ms: np.ndarray, choice: OnAir) -> np.ndarray:
        """Return the place of the segment that was on air in each past visit, ``[entries]`` int64; -1 without one.

        Videos have no segments. A visit that was left at once saw the moment of its entry.

        Args:
            visits: entries of histories.
            as_of_ms: ``[entries]`` int64, time of each entry's row.
            choice: as in :meth:`on_air`.
        """
        places = np.full(len(visits.item_id), NO_SEGMENT)
        live = np.flatnonzero(visits.domain == _LIVE)
        begin_ms, end_ms = _watched_ms(visits, live)
        places[live] = self.on_air(visits.item_id[live], begin_ms, end_ms, as_of_ms[live], choice)
        return places

    def changes(self, visits: HistorySlice, from_ms: np.ndarray, choice: OnAir) -> SegmentChanges:
        """Return what :meth:`watched` answers for each past visit, at every time from one on.

        Args:
            visits: n visits.
            from_ms: ``[n]`` int64, first time that is asked for.
            choice: as in :meth:`on_air`.
        """
        live = np.flatnonzero(visits.domain == _LIVE)
        asked = (
            self._rooms,
            self._room_bounds,
            self._starts,
            self._known_in_room,
            _whole(visits.item_id[live]),
            *_watched_ms(visits, live),
            _whole(from_ms[live]),
            choice == "longest",
            SEGMENT_MS,
        )
        of_live, nothing = np.zeros(len(live), np.int64), np.empty(0, np.int64)
        _changes(*asked, of_live, nothing, nothing, False)
        since_ms, places = (np.empty(of_live.sum(), np.int64) for _ in range(2))
        _changes(*asked, of_live, since_ms, places, True)
        counts = np.zeros(len(visits.item_id), np.int64)
        counts[live] = of_live
        return SegmentChanges(counts, since_ms, self._in_room[places])


def _watched_ms(visits: HistorySlice, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return begin and end of some visits, ``[live]`` int64."""
    begin_ms = _whole(visits.request_ms[live])
    return begin_ms, begin_ms + np.maximum(visits.play_ms[live], 1)


def _whole(values: np.ndarray) -> np.ndarray:
    """Return values as contiguous int64, so that the loops are compiled for one type only."""
    return np.ascontiguousarray(values, np.int64)


def _runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids ``[k]`` of a sorted array, and the bounds ``[k + 1]`` of their runs."""
    distinct, first = np.unique(ids, return_index=True)
    return distinct, np.append(first, len(ids)).astype(np.int64)


@compiled("reading segments", nogil=True)
def _first_not_below(column: np.ndarray, first: int, stop: int, value: int) -> int:
    """Return the first place in ``[first, stop)`` whose value is not below ``value``; ``stop`` if there is none."""
    while first < stop:
        middle = (first + stop) >> 1
        if column[middle] < value:
            first = middle + 1
        else:
            stop = middle
    return first


@compiled("reading segments", nogil=True)
def _spans(
    authors: np.ndarray,
    bounds: np.ndarray,
    known_ms: np.ndarray,
    wanted: np.ndarray,
    as_of_ms: np.ndarray,
    first: np.ndarray,
    stop: np.ndarray,
) -> None:
    """Write the places ``[first, stop)`` of each wanted author's segments that are known as of a time."""
    for row in range(len(wanted)):
        first[row] = stop[row] = 0
        run = _first_not_below(authors, 0, len(authors), wanted[row])
        if wanted[row] >= 0 and run < len(authors) and authors[run] == wanted[row]:
            first[row] = bounds[run]
            stop[row] = _first_not_below(known_ms, bounds[run], bounds[run + 1], as_of_ms[row] + 1)


@compiled("reading segments", nogil=True)
def _first_on_air(
    rooms: np.ndarray, bounds: np.ndarray, starts: np.ndarray, room: int, begin_ms: int, length: int
) -> tuple[int, int]:
    """Return the places ``[place, end)`` of a room's segments that end after a visit has begun, in order of starts."""
    run = _first_not_below(rooms, 0, len(rooms), room)
    if run == len(rooms) or rooms[run] != room:
        return 0, 0
    # Segments that start earlier have ended before the visit.
    return _first_not_below(starts, bounds[run], bounds[run + 1], begin_ms - length + 1), bounds[run + 1]


@compiled("reading segments", nogil=True)
def _chosen(
    starts: np.ndarray,
    known_ms: np.ndarray,
    place: int,
    end: int,
    begin_ms: int,
    end_ms: int,
    as_of_ms: int,
    longest: bool,
    length: int,
) -> tuple[int, int]:
    """Return the place of a visit's segment as of a time, -1 without one; and the next time at which one gets known."""
    chosen, most, later = -1, 0, _NEVER
    while place < end:
        if (starts[place] >= end_ms) if longest else (starts[place] > begin_ms):
            break
        if known_ms[place] > as_of_ms:
            later = min(later, known_ms[place])
        elif longest:
            overlap = min(starts[place] + length, end_ms) - max(starts[place], begin_ms)
            if overlap > most:
                most = overlap
                chosen = place
        else:
            chosen = place
        place += 1
    return chosen, later


@compiled("reading segments", nogil=True)
def _on_air(
    rooms: np.ndarray,
    bounds: np.ndarray,
    starts: np.ndarray,
    known_ms: np.ndarray,
    wanted: np.ndarray,
    begin_ms: np.ndarray,
    end_ms: np.ndarray,
    as_of_ms: np.ndarray,
    longest: bool,
    length: int,
    places: np.ndarray,
) -> None:
    """Write the place of each visit's segment among the segments sorted by room and start; -1 without one."""
    for row in range(len(wanted)):
        place, end = _first_on_air(rooms, bounds, starts, wanted[row], begin_ms[row], length)
        places[row], _ = _chosen(
            starts, known_ms, place, end, begin_ms[row], end_ms[row], as_of_ms[row], longest, length
        )


@compiled("reading segments", nogil=True)
def _changes(
    rooms: np.ndarray,
    bounds: np.ndarray,
    starts: np.ndarray,
    known_ms: np.ndarray,
    wanted: np.ndarray,
    begin_ms: np.ndarray,
    end_ms: np.ndarray,
    from_ms: np.ndarray,
    longest: bool,
    length: int,
    counts: np.ndarray,
    since_ms: np.ndarray,
    places: np.ndarray,
    write: bool,
) -> None:
    """Count the changes of each visit's segment; with ``write``, write them, visit after visit."""
    at = 0
    for row in range(len(wanted)):
        place, end = _first_on_air(rooms, bounds, starts, wanted[row], begin_ms[row], length)
        since, latest, count = from_ms[row], -1, 0
        while True:
            chosen, later = _chosen(starts, known_ms, place, end, begin_ms[row], end_ms[row], since, longest, length)
            if chosen != latest:
                if write:
                    since_ms[at] = since
                    places[at] = chosen
                latest = chosen
                count += 1
                at += 1
            # Known segments stay known, so the times at which others get known are all that can change the answer.
            if later == _NEVER:
                break
            since = later
        counts[row] = count
