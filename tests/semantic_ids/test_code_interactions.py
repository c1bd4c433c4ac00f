"""Interactions by segment and code against a plain definition."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.format.text_schema import SEGMENT_MS
from trainer.semantic_ids.air_time import BEFORE_FIRST, NO_ROOM, OFF_AIR, AirTime
from trainer.semantic_ids.code_interactions import (
    HOUR_MS,
    UNATTRIBUTED,
    WITHOUT_CODE,
    SegmentActivity,
    add_visits,
    author_sums,
    visits_of,
)
from trainer.semantic_ids.code_rates import CellSums
from trainer.stream.labels.assembled_rows import ENTER, EXIT, EXPOSURE, FIRST_BEHAVIOUR

BEHAVIOURS = ("click", "gift")
CODES = 3
VIDEO, LIVE = 0, 1

TIMES = st.integers(0, 12).map(lambda quarter: quarter * SEGMENT_MS // 4)
SEGMENT = st.tuples(st.integers(0, 2), TIMES, st.integers(-1, CODES - 1))
EVENT = st.tuples(st.sampled_from((EXPOSURE, ENTER, FIRST_BEHAVIOUR, FIRST_BEHAVIOUR + 1)), TIMES)
VISIT = st.tuples(
    st.integers(0, 2),  # user
    st.integers(0, 3),  # room
    st.sampled_from((LIVE, LIVE, LIVE, VIDEO)),
    st.lists(EVENT, max_size=5),
    st.none() | st.tuples(TIMES, TIMES),  # exit and time watched
)


def empty_activity(segments: int) -> SegmentActivity:
    count = len(BEHAVIOURS)
    return SegmentActivity(
        BEHAVIOURS,
        np.zeros(segments),
        np.zeros(segments),
        np.zeros((segments, count)),
        np.zeros(count, np.int64),
        {reason: np.zeros(count, np.int64) for reason in UNATTRIBUTED},
        0,
        0,
        CellSums.zeros(CODES, count),
    )


def plain_at(segments: list[Any], room: int, time: int) -> int:
    own = [(start, place) for place, (item, start, _) in enumerate(segments) if item == room]
    begun = [pair for pair in own if pair[0] <= time]
    if not own or not begun:
        return BEFORE_FIRST if own else NO_ROOM
    start, place = max(begun)
    return place if time < start + SEGMENT_MS else OFF_AIR


class Plain:
    """The definition, one event at a time, in exact fractions."""

    def __init__(self, segments: list[Any]) -> None:
        self.segments = segments
        self.watch: dict[int, int] = defaultdict(int)
        self.exposures: dict[int, int] = defaultdict(int)
        self.events: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
        self.unattributed: dict[tuple[int, int], int] = defaultdict(int)
        self.cells: dict[tuple[str, int, int], Fraction] = defaultdict(Fraction)
        self.without_exit = self.spread = 0

    def add(self, visit: Any) -> None:
        user, room, domain, events, end = visit
        if domain != LIVE or not (events or end):
            return
        self.without_exit += end is None
        opened = [time for event, time in events if event in (EXPOSURE, ENTER)]
        exit_ms, play_ms = end or (None, 0)
        begin = min(opened) if opened else (exit_ms or 0) - play_ms
        steps: dict[int, int] = defaultdict(int)
        for moment in range(begin, begin + play_ms, SEGMENT_MS // 4):
            place = plain_at(self.segments, room, moment)
            if place >= 0:
                steps[place] += 1
        for place, count in steps.items():
            self.watch[place] += count * SEGMENT_MS // 4
            self._cell("watch", user, place, Fraction(count * SEGMENT_MS // 4, HOUR_MS))
        if opened and (place := plain_at(self.segments, room, begin)) >= 0:
            self.exposures[place] += 1
            self._cell("exposure", user, place, Fraction(1))
        for event, time in events:
            if event < FIRST_BEHAVIOUR:
                continue
            behaviour = event - FIRST_BEHAVIOUR
            place = plain_at(self.segments, room, time)
            if time == exit_ms and play_ms and steps:
                self.spread += 1
                for watched, count in steps.items():
                    self._event(user, watched, behaviour, Fraction(count, sum(steps.values())))
            elif place < 0:
                self.unattributed[place, behaviour] += 1
            else:
                self._event(user, place, behaviour, Fraction(1))

    def _event(self, user: int, place: int, behaviour: int, amount: Fraction) -> None:
        self.events[place, behaviour] += amount
        self._cell(BEHAVIOURS[behaviour], user, place, amount)

    def _cell(self, what: str, user: int, place: int, amount: Fraction) -> None:
        if (code := self.segments[place][2]) >= 0:
            self.cells[what, user, code] += amount

    def sums(self, behaviour: int, by: Any = None) -> list[list[float]]:
        base = "exposure" if BEHAVIOURS[behaviour] == "click" else "watch"
        totals = np.zeros((5, CODES))
        for user in range(3):
            for code in range(CODES):
                n, b = (float(self.cells[what, user, code]) for what in (BEHAVIOURS[behaviour], base))
                totals[:, code] += (n, b, n * n, n * b, b * b)
        return totals.tolist()


@settings(deadline=None)
@given(st.lists(SEGMENT, max_size=8), st.lists(VISIT, max_size=8), st.randoms())
def test_sums_are_those_of_the_definition(segments: list[Any], visits: list[Any], random: Any) -> None:
    compare(segments, visits, random)


def test_sums_are_those_of_the_definition_on_dense_worlds() -> None:
    """Many visits of few users to few rooms, a third of whose events are at the exit."""
    spread = 0
    for seed in range(40):
        rng = Random(seed)

        def time(rng: Random = rng) -> int:
            return rng.randrange(13) * SEGMENT_MS // 4

        segments = [(rng.randrange(3), time(), rng.randrange(-1, CODES)) for _ in range(10)]
        visits = []
        for _ in range(12):
            begin, play = time(), time()
            times = [rng.choice((begin, time(), begin + play)) for _ in range(4)]
            events = [(EXPOSURE, begin), *((FIRST_BEHAVIOUR + rng.randrange(2), moment) for moment in times)]
            visits.append((rng.randrange(3), rng.randrange(4), LIVE, events, (begin + play, play)))
        spread += compare(segments, visits, rng).spread
    assert spread > 300


def compare(segments: list[Any], visits: list[Any], random: Any) -> Plain:
    """Compare the sums of a log with those of the definition, and return the latter."""
    plain = Plain(segments)
    rows = []
    for number, visit in enumerate(visits):
        user, room, domain, events, end = visit
        plain.add(visit)
        rows += [(user, room, domain, number, event, time, 0) for event, time in events]
        rows += [(user, room, domain, number, EXIT, *end)] if end else []
    random.shuffle(rows)
    names = ("user_id", "item_id", "domain", "visit_id", "event", "time_ms", "value")
    columns = {name: np.array([row[place] for row in rows], np.int64) for place, name in enumerate(names)}
    columns["value"] = columns["value"].astype(np.float32)
    columns["event"] = columns["event"].astype(np.int8)
    item, start, code = (np.array([segment[place] for segment in segments], np.int64) for place in range(3))
    activity = empty_activity(len(segments))
    add_visits(activity, *visits_of(columns), AirTime(item, start), code)
    places = range(len(segments))
    assert activity.watch_ms.tolist() == [plain.watch[place] for place in places]
    assert activity.exposures.tolist() == [plain.exposures[place] for place in places]
    expected = np.array([[float(plain.events[place, b]) for b in range(2)] for place in places]).reshape(-1, 2)
    assert activity.events == pytest.approx(expected)
    assert int(activity.spread.sum()) == plain.spread and activity.without_exit == plain.without_exit
    for reason in (NO_ROOM, BEFORE_FIRST, OFF_AIR):
        assert activity.unattributed[reason].tolist() == [plain.unattributed[reason, b] for b in range(2)]
    for behaviour in range(2):
        found = [
            column[:, behaviour].tolist()
            for column in (
                activity.users.events,
                activity.users.base,
                activity.users.events_squared,
                activity.users.product,
                activity.users.base_squared,
            )
        ]
        assert np.array(found) == pytest.approx(np.array(plain.sums(behaviour)), abs=1e-12)
    # Over authors the totals are the same; with one author, the cells are the codes.
    one = author_sums(activity, code, np.zeros(len(segments), np.int64), CODES)
    assert one.events == pytest.approx(activity.users.events) and one.base == pytest.approx(activity.users.base)
    assert one.product == pytest.approx(one.events * one.base)
    return plain


def test_what_belongs_to_no_code_is_counted_by_its_reason() -> None:
    """An event before the first segment, at the end of one, in a room without segments, and in one without a code."""
    events = [(0, 5), (0, 30_010), (0, 30_009), (7, 0), (1, 10)]
    rows = [(9, room, LIVE, 4 + place, FIRST_BEHAVIOUR + 1, time, 0.0) for place, (room, time) in enumerate(events)]
    names = ("user_id", "item_id", "domain", "visit_id", "event", "time_ms", "value")
    columns = {name: np.array([row[place] for row in rows]) for place, name in enumerate(names)}
    activity = empty_activity(2)
    code = np.array([0, -1])
    add_visits(activity, *visits_of(columns), AirTime(np.array([0, 1]), np.array([10, 10])), code)
    counts = {reason: int(numbers[1]) for reason, numbers in activity.unattributed.items()}
    assert counts == {NO_ROOM: 1, BEFORE_FIRST: 1, OFF_AIR: 1, WITHOUT_CODE: 1}
    assert activity.events[:, 1].tolist() == [1, 1] and activity.users.events[:, 1].tolist() == [1, 0, 0]
    assert activity.visits == activity.without_exit == 5
