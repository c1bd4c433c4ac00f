"""Index of segments: equal to a plain definition, and blind to what becomes known later."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.features.segment_index import OnAir, SegmentIndex
from trainer.data.format.history import HistorySlice
from trainer.data.format.text_schema import SEGMENT_MS

SMALL = st.integers(-1, 3)
# Starts that touch, overlap and leave gaps; times that are equal and that differ by one.
START = st.integers(-2, 6).map(lambda step: step * SEGMENT_MS // 2) | st.integers(0, 4 * SEGMENT_MS)
CHOICES: tuple[OnAir, ...] = ("entry", "longest")
DELAY = st.sampled_from([0, 1, SEGMENT_MS, SEGMENT_MS + 1, 3 * SEGMENT_MS])


class Segment(NamedTuple):
    """One segment."""

    author: int
    room: int
    start_ms: int
    known_ms: int


class Visit(NamedTuple):
    """One question."""

    author: int
    room: int
    begin_ms: int
    end_ms: int
    as_of_ms: int


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    start_ms = draw(START)
    return Segment(draw(SMALL), draw(SMALL), start_ms, start_ms + draw(DELAY))


@st.composite
def visits(draw: st.DrawFn) -> Visit:
    begin_ms = draw(START)
    return Visit(draw(SMALL), draw(SMALL), begin_ms, begin_ms + draw(DELAY), draw(START) + draw(DELAY))


def index_of(lines: list[Segment]) -> SegmentIndex:
    columns = np.array(lines, np.int64).reshape(-1, 4).T
    return SegmentIndex(*columns)


def plain_latest(lines: list[Segment], visit: Visit) -> int:
    known = [
        (line.known_ms, place)
        for place, line in enumerate(lines)
        if line.author == visit.author != -1 and line.known_ms <= visit.as_of_ms
    ]
    return max(known)[1] if known else -1


def plain_on_air(lines: list[Segment], visit: Visit, choice: OnAir) -> int:
    room = [
        (place, line) for place, line in enumerate(lines) if line.room == visit.room and line.known_ms <= visit.as_of_ms
    ]
    if choice == "entry":
        on = [(line.start_ms, place) for place, line in room if 0 <= visit.begin_ms - line.start_ms < SEGMENT_MS]
        return max(on)[1] if on else -1
    overlaps = []
    for place, line in room:
        overlap = min(line.start_ms + SEGMENT_MS, visit.end_ms) - max(line.start_ms, visit.begin_ms)
        if overlap > 0:
            overlaps.append((-overlap, line.start_ms, place))
    return min(overlaps)[2] if overlaps else -1


def answers(index: SegmentIndex, asked: list[Visit]) -> list[list[int]]:
    author, room, begin_ms, end_ms, as_of_ms = np.array(asked, np.int64).reshape(-1, 5).T
    return [
        index.latest(author, as_of_ms).tolist(),
        index.counts(author, as_of_ms).tolist(),
        index.on_air(room, begin_ms, end_ms, as_of_ms, "entry").tolist(),
        index.on_air(room, begin_ms, end_ms, as_of_ms, "longest").tolist(),
    ]


@given(lines=st.lists(segments(), max_size=20), asked=st.lists(visits(), max_size=6))
def test_answers_are_those_of_the_plain_definition(lines: list[Segment], asked: list[Visit]) -> None:
    index = index_of(lines)
    known = [
        [p for p, line in enumerate(lines) if line.author == v.author != -1 and line.known_ms <= v.as_of_ms]
        for v in asked
    ]
    assert answers(index, asked) == [
        [plain_latest(lines, visit) for visit in asked],
        [len(places) for places in known],
        [plain_on_air(lines, visit, "entry") for visit in asked],
        [plain_on_air(lines, visit, "longest") for visit in asked],
    ]
    first, stop = index.span(np.array([v.author for v in asked], np.int64), np.array([v.as_of_ms for v in asked]))
    for places, begin, end in zip(known, first.tolist(), stop.tolist(), strict=True):
        ordered = sorted(places, key=lambda place: (lines[place].known_ms, place))
        assert index.order[begin:end].tolist() == ordered


@given(
    lines=st.lists(segments(), max_size=15),
    later=st.lists(segments(), max_size=15),
    asked=st.lists(visits(), min_size=1, max_size=6),
)
def test_segments_that_become_known_later_change_no_answer(
    lines: list[Segment], later: list[Segment], asked: list[Visit]
) -> None:
    as_of_ms = min(visit.as_of_ms for visit in asked)
    asked = [visit._replace(as_of_ms=as_of_ms) for visit in asked]
    known = [line for line in lines if line.known_ms <= as_of_ms]
    # Known segments keep their places in front, and everything that becomes known later is another one.
    changed = known + [line for line in later if line.known_ms > as_of_ms]
    whole = known + [line for line in lines if line.known_ms > as_of_ms]
    assert answers(index_of(whole), asked) == answers(index_of(changed), asked) == answers(index_of(known), asked)


@given(lines=st.lists(segments(), max_size=12), asked=st.lists(visits(), max_size=6), choice=st.sampled_from(CHOICES))
def test_changes_are_the_answers_of_every_time(lines: list[Segment], asked: list[Visit], choice: OnAir) -> None:
    """Also for videos, which never have a segment."""
    columns = np.array(asked, np.int64).reshape(-1, 5).T
    _, room, begin_ms, end_ms, from_ms = columns
    live = room % 2 == 1
    nothing = np.zeros(len(asked), np.int64)
    past = HistorySlice(nothing, room, nothing, begin_ms, end_ms - begin_ms, nothing, nothing, live.astype(np.uint8))
    index = index_of(lines)
    counts, since_ms, places = index.changes(past, from_ms, choice)
    stops = counts.cumsum()
    assert len(since_ms) == len(places) == counts.sum() and not counts[~live].any()
    for row, stop in enumerate(stops.tolist()):
        own, found = since_ms[stop - counts[row] : stop], places[stop - counts[row] : stop]
        assert (np.diff(own) > 0).all() and (own >= from_ms[row]).all() and (np.diff(found) != 0).all()
        times = {int(from_ms[row]), *(line.known_ms + more for line in lines for more in (-1, 0))}
        for time in sorted(time for time in times if time >= from_ms[row]):
            latest = np.searchsorted(own, time, side="right")
            expected = index.watched(past, np.full(len(asked), time), choice)[row]
            assert (found[latest - 1] if latest else -1) == expected


@pytest.mark.parametrize("count", [0, 1])
def test_few_segments_and_no_question(count: int) -> None:
    index = index_of([Segment(2, 3, 0, SEGMENT_MS)] * count)
    assert len(index) == count and answers(index, []) == [[], [], [], []]
    assert answers(index, [Visit(2, 3, 5, 6, SEGMENT_MS)]) == [[count - 1], [count], [count - 1], [count - 1]]
