"""The pace: every second segment while the model is too slow for the rooms on air, and all again afterwards."""

from __future__ import annotations

import pytest

from trainer.semantic_ids.follow_pace import Pace, PaceChange

BEHIND = 30.0


def simulate(pace: Pace, rooms: int, capacity: float, seconds: int, now: float = 0.0) -> list[tuple[int, PaceChange]]:
    """Run a model of a capacity, in segments a second, against rooms with a segment every 30 seconds each."""
    changes = []
    waiting: list[tuple[float, int]] = []
    free_at = now
    for second in range(round(now), round(now) + seconds):
        arrived = [(second, second // 30) for room in range(rooms) if room % 30 == second % 30]
        pace.arrived([second * 1000 for _ in arrived])
        waiting += [one for one in arrived if pace.takes(one[1])]
        while waiting and free_at < second + 1:
            known, number = waiting.pop(0)
            if not pace.takes(number):
                continue
            free_at = max(free_at, known) + 1 / capacity
            pace.worked(free_at, 1 / capacity, 1)
            if change := pace.update(free_at, free_at - known):
                changes.append((second, change))
    return changes


def test_a_model_that_is_fast_enough_takes_all() -> None:
    pace = Pace(BEHIND)
    assert simulate(pace, rooms=90, capacity=4.0, seconds=600) == [] and not pace.halved
    assert pace.needed == pytest.approx(3.0) and pace.reached == pytest.approx(4.0)


def test_a_model_that_is_too_slow_drops_every_second_segment_and_says_so_once() -> None:
    pace = Pace(BEHIND)
    ((_, change),) = simulate(pace, rooms=90, capacity=2.0, seconds=3000)
    assert change.halved and pace.halved
    assert change.needed == pytest.approx(3.0, rel=0.05) and change.reached == pytest.approx(2.0)
    assert pace.takes(4) and not pace.takes(5)


def test_it_takes_all_again_when_the_rooms_are_fewer() -> None:
    pace = Pace(BEHIND)
    simulate(pace, rooms=90, capacity=2.0, seconds=600)
    assert pace.halved
    changes = simulate(pace, rooms=30, capacity=2.0, seconds=600, now=600)
    assert [change.halved for _, change in changes] == [False]


def test_it_does_not_change_its_mind_near_the_limit() -> None:
    """Half of the load is 0.6 of the capacity: all segments would be too many."""
    pace = Pace(BEHIND)
    assert [change.halved for _, change in simulate(pace, rooms=72, capacity=2.0, seconds=6000)] == [True]


def test_a_job_that_was_away_only_catches_up() -> None:
    """The lag is an hour, but the rooms on air need less than the model reaches."""
    pace = Pace(BEHIND)
    for number in range(200):
        pace.arrived([number * 1000])
        pace.worked(5000 + number / 2, 0.5, 1)
        assert pace.update(5000 + number / 2, 3600.0) is None
    assert pace.needed == pytest.approx(1.0) and pace.reached == pytest.approx(2.0)


def test_rooms_in_step_need_as_much_as_others() -> None:
    pace = Pace(BEHIND)
    for second in (0, 30, 60, 90):
        pace.arrived([second * 1000] * 60)
        assert pace.needed == pytest.approx(2.0)
