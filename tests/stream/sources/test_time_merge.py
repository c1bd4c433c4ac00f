"""Tests of the merge of partitions: one order for any arrival of portions, and the position after each batch."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.event_logs import assert_logged, logged_of
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import EVENT_TYPES
from trainer.stream.sources.logged_features import RequestFeatures
from trainer.stream.sources.time_merge import TimeMerge

LANES = st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4)


def columns(times: list[int], first: int) -> tuple[Columns, RequestFeatures]:
    """Return exposures at ``times`` and their logged features."""
    n = len(times)
    events = {name: np.zeros(n, dtype) for name, dtype in EVENT_TYPES.items()}
    events["visit_id"] = np.arange(first, first + n)
    events = {**events, "time_ms": np.array(times, np.int64), "place": np.arange(first + 1, first + n + 1)}
    return events, logged_of(events)


def expected(lanes: list[list[int]]) -> list[tuple[int, int]]:
    """Return (partition, place) of all events in merge order."""
    keyed = [(max(times[: k + 1]), p, k) for p, times in enumerate(lanes) for k in range(len(times))]
    return [(p, k) for _, p, k in sorted(keyed)]


@settings(max_examples=200, deadline=None)
@given(lanes=LANES, events=st.integers(1, 7), seed=st.integers(0, 1 << 20), start=st.integers(0, 40))
def test_order_depends_neither_on_portions_nor_on_the_start(lanes, events, seed, start):
    rng = random.Random(seed)
    whole = expected(lanes)
    start = min(start, len(whole))
    position = {p: [0, 0, 0, 0] for p in range(len(lanes))}
    for p, k in whole[:start]:
        position[p] = [k + 1, 0, max(lanes[p][: k + 1]), 0]
    merge = TimeMerge(position)
    fed = {p: at[0] for p, at in position.items()}
    taken: list[tuple[int, int]] = []
    while len(taken) < len(whole) - start:
        p = rng.randrange(len(lanes))
        size = rng.randint(0, 3)
        merge.append(p, *columns(lanes[p][fed[p] : fed[p] + size], fed[p]))
        fed[p] = min(fed[p] + size, len(lanes[p]))
        merge.wait_for(p, fed[p] < len(lanes[p]))
        ended = all(fed[p] == len(lanes[p]) for p in fed)
        while (batch := merge.take(events, rest=ended)) is not None:
            assert len(batch) == events or ended
            assert_logged(batch.events, batch.logged)
            taken += zip(batch.partition.tolist(), batch.events["visit_id"].tolist(), strict=True)
            for q, at in batch.position.items():
                done = [k for owner, k in whole[: start + len(taken)] if owner == q]
                assert at == [len(done), 0, max(lanes[q][: len(done)], default=0), 0]
    assert taken == whole[start:]
    assert merge.events == 0


def test_later_events_of_a_silent_partition_follow_in_their_order():
    merge = TimeMerge({0: [0, 0, 0, 0], 1: [0, 0, 0, 0]})
    merge.append(0, *columns([5, 6], 0))
    assert merge.take(1, rest=True) is None, "partition 1 may still bring something earlier"
    merge.wait_for(1, False)
    assert len(merge.take(9, rest=True) or []) == 2
    merge.append(1, *columns([3, 1], 0))
    merge.wait_for(1, True)
    batch = merge.take(9, rest=True)
    assert batch is not None
    assert batch.events["time_ms"].tolist() == [3, 1]
    assert batch.position == {0: [2, 0, 6, 0], 1: [2, 0, 3, 0]}


def test_batches_end_at_multiples_of_every_tick():
    merge = TimeMerge({0: [0, 0, 0, 0]})
    merge.append(0, *columns([1, 9, 10, 13, 14, 20, 21, 27, 28], 0))
    merge.wait_for(0, False)
    times = []
    while (batch := merge.take(9, ticks_ms=[10, 7], rest=True)) is not None:
        times.append(batch.events["time_ms"].tolist())
    assert times == [[1], [9], [10, 13], [14], [20], [21, 27], [28]]


def test_ticks_end_batches_at_their_multiples():
    merge = TimeMerge({0: [0, 0, 0, 0]})
    merge.append(0, *columns([1, 9, 10, 11, 12, 31, 32], 0))
    sizes = []
    while (batch := merge.take(2, ticks_ms=[10])) is not None:
        sizes.append(batch.events["time_ms"].tolist())
    assert sizes == [[1, 9], [10, 11], [12], [31, 32]]
    merge.append(0, *columns([39], 7))
    assert merge.take(2, ticks_ms=[10]) is None, "33 to 39 may still come"
    merge.wait_for(0, False)
    rest = merge.take(2, ticks_ms=[10], rest=True)
    assert rest is not None
    assert rest.events["time_ms"].tolist() == [39]
