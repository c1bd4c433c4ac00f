"""Segments on air against the plain definition, and against the index that features read."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.features.segment_index import SegmentIndex
from trainer.data.format.text_schema import SEGMENT_MS
from trainer.semantic_ids.air_time import BEFORE_FIRST, NO_ROOM, OFF_AIR, AirTime

TIMES = st.integers(0, 12).map(lambda quarter: quarter * SEGMENT_MS // 4)
SEGMENTS = st.lists(st.tuples(st.integers(0, 2), TIMES), max_size=8)


def plain_at(segments: list[tuple[int, int]], room: int, time: int) -> int:
    own = [(start, place) for place, (item, start) in enumerate(segments) if item == room]
    if not own:
        return NO_ROOM
    begun = [pair for pair in own if pair[0] <= time]
    if not begun:
        return BEFORE_FIRST
    start, place = max(begun)
    return place if time < start + SEGMENT_MS else OFF_AIR


def air_of(segments: list[tuple[int, int]]) -> AirTime:
    return AirTime(*(np.array([segment[column] for segment in segments], np.int64) for column in range(2)))


@given(SEGMENTS, st.lists(st.tuples(st.integers(0, 3), TIMES), max_size=8))
def test_a_time_belongs_to_the_segment_that_started_last(
    segments: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    item, time = (np.array([pair[column] for pair in wanted], np.int64) for column in range(2))
    found = air_of(segments).at(item, time)
    assert found.tolist() == [plain_at(segments, room, moment) for room, moment in wanted]
    # Features know the same segment, as of a time when all are known.
    rooms, starts = (np.array([segment[column] for segment in segments], np.int64) for column in range(2))
    index = SegmentIndex(rooms, rooms, starts, starts)
    on_air = index.on_air(item, time, time + 1, np.full(len(item), 1 << 60), "entry")
    assert np.where(found >= 0, found, -1).tolist() == on_air.tolist()


@given(SEGMENTS, st.lists(st.tuples(st.integers(0, 3), TIMES, TIMES), max_size=5))
def test_a_visit_is_split_by_the_segments_on_air(
    segments: list[tuple[int, int]], visits: list[tuple[int, int, int]]
) -> None:
    item, begin, end = (np.array([visit[column] for visit in visits], np.int64) for column in range(3))
    found = air_of(segments).overlaps(item, begin, end)
    # All times are multiples of this step, so a step is in one segment.
    step, expected = SEGMENT_MS // 4, {}
    for number, (room, first, last) in enumerate(visits):
        for moment in range(first, last, step):
            place = plain_at(segments, room, moment)
            if place >= 0:
                expected[number, place] = expected.get((number, place), 0) + step
    assert list(zip(found.visit.tolist(), found.place.tolist(), strict=True)) == sorted(
        expected, key=lambda pair: (pair[0], segments[pair[1]][1])
    )
    assert {(v, p): ms for v, p, ms in zip(*(column.tolist() for column in found), strict=True)} == expected
