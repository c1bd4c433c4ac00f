"""Search for earlier events: equal to a plain loop, with equal times and empty inputs."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.comment_staytime.earlier_events import earlier_events


@pytest.mark.parametrize("seed", range(4))
def test_the_runs_are_those_of_a_plain_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    visits, events = 80, 200
    groups = (random.integers(0, 3, visits), random.integers(0, 3, visits))
    owner = random.integers(0, visits, events)
    # Few different times, so that many are equal.
    known, request = random.integers(0, 20, events), random.integers(0, 20, visits)
    order, first, stop = earlier_events(groups, owner, known, request)
    assert sorted(order.tolist()) == list(range(events))
    for row in range(visits):
        expected = [
            event
            for event in range(events)
            if all(group[owner[event]] == group[row] for group in groups) and known[event] < request[row]
        ]
        assert order[first[row] : stop[row]].tolist() == sorted(expected, key=lambda event: known[event])


def test_without_events_all_runs_are_empty() -> None:
    nothing = np.empty(0, np.int64)
    order, first, stop = earlier_events((np.array([1, 2]),), nothing, nothing, np.array([5, 6]))
    assert not len(order) and (first == stop).all()
    order, first, stop = earlier_events((nothing,), nothing, nothing, nothing)
    assert not len(order) and not len(first) and not len(stop)
