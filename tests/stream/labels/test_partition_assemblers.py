"""Tests of the streaming assembler's state: it moves between ranks, stays small, and is refused by other rules."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.random_logs import (
    POLICIES,
    SPEC,
    TIMEOUTS,
    columns_of,
    logs,
    portions,
    rows_as_tuples,
    started_as_tuples,
)
from tests.stream.reference import Event
from trainer.console.errors import UserError
from trainer.stream.labels.open_visit import OpenVisit
from trainer.stream.labels.partition_assemblers import PartitionAssemblers
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Full, Policy, Realtime, RealtimeNaive
from trainer.stream.labels.streaming_assembler import StreamAssembler

PARTITIONS = 4


def of_ranks(world: int, policy: Policy) -> list[PartitionAssemblers]:
    return [PartitionAssemblers(SPEC, policy, TIMEOUTS, range(rank, PARTITIONS, world)) for rank in range(world)]


@settings(max_examples=30, deadline=None)
@given(by_partition=st.lists(logs(), min_size=PARTITIONS, max_size=PARTITIONS), data=st.data())
def test_any_number_of_ranks_goes_on_with_the_open_visits(by_partition: list[list[Event]], data: st.DataObject) -> None:
    """With 2 ranks, then 1, then 3, each partition gives the rows that it gives alone."""
    for policy in POLICIES:
        rows: list[list[object]] = [[] for _ in range(PARTITIONS)]
        started: list[list[object]] = [[] for _ in range(PARTITIONS)]
        parts = [
            portions(columns_of(events), data.draw(st.lists(st.integers(0, len(events)), min_size=2, max_size=2)))
            for events in by_partition
        ]
        states: list[dict[int, dict[str, np.ndarray]]] = []
        for phase, world in enumerate((2, 1, 3)):
            ranks = of_ranks(world, policy)
            for rank in ranks if states else []:
                rank.load_state_dict(states)
            for partition in range(PARTITIONS):
                rank = ranks[partition % world]
                made = rank.push(partition, parts[partition][phase])
                rows[partition] += rows_as_tuples(made.rows)
                started[partition] += started_as_tuples(made.started)
            states = [rank.state_dict() for rank in ranks]
            assert sorted(partition for state in states for partition in state) == list(range(PARTITIONS))
        for partition, events in enumerate(by_partition):
            last = ranks[partition % 3].advance(partition)
            rows[partition] += rows_as_tuples(last.rows)
            alone = StreamAssembler(SPEC, policy, TIMEOUTS)
            expected = [alone.push(columns_of(events)), alone.advance()]
            started[partition] += started_as_tuples(last.started)
            assert started[partition] == [visit for made in expected for visit in started_as_tuples(made.started)]
            assert rows[partition] == [row for made in expected for row in rows_as_tuples(made.rows)]


def visit_events(visit: int, start: int) -> list[Event]:
    names = (("exposure", 0), ("click", 20), ("like", 60))
    return [Event(visit % 50, visit, 1, 2, "live", name, start + offset) for name, offset in names]


def test_a_state_is_a_copy_of_plain_arrays() -> None:
    stream = StreamAssembler(SPEC, Realtime(30), TIMEOUTS)
    stream.push(columns_of([event for visit in range(5) for event in visit_events(visit, 10 * visit)]))
    state = stream.state_dict()
    assert {column.dtype.kind for column in state.values()} <= {"i", "f"}
    assert len(state["visit.visit_id"]) == stream.open_visits > 0
    assert len(state["event.time_ms"]) == stream.waiting_events > 0
    before = {name: column.copy() for name, column in state.items()}
    rows = rows_as_tuples(stream.advance().rows)
    again = StreamAssembler(SPEC, Realtime(30), TIMEOUTS)
    again.load_state_dict(state)
    assert all(np.array_equal(column, before[name]) for name, column in state.items())
    assert rows_as_tuples(again.advance().rows) == rows != []
    assert again.counts == stream.counts


def test_simultaneous_events_stay_in_order_of_arrival() -> None:
    """The first to arrive of two exposures of a visit at one millisecond gives the ids, also after a restore."""
    first = Event(1, 7, 11, 12, "live", "exposure", 50)
    second = [Event(1, 8, 0, 0, "live", "exposure", 40), first._replace(author_id=99)]
    stream = StreamAssembler(SPEC, Full(), TIMEOUTS)
    stream.push(columns_of([first]))
    stream.push(columns_of(second))
    restored = StreamAssembler(SPEC, Full(), TIMEOUTS)
    restored.load_state_dict(stream.state_dict())
    for assembler in (stream, restored):
        assert [row.author_id for row in rows_as_tuples(assembler.advance().rows)] == [0, 11]


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Leave the objects of libraries and of other tests out of ``gc.get_objects()``, which takes long with them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_memory_is_that_of_the_open_visits(policy: Policy) -> None:
    """Ten thousand visits pass, with a few hundred open at a time; memory holds little more than the open ones."""
    events = [event for visit in range(10_000) for event in visit_events(visit, visit)]
    events += [Event(visit % 50, visit, 1, 2, "live", "exit", visit + 100) for visit in range(10_000)]
    columns = columns_of(sorted(events, key=lambda event: event.time_ms))
    stream = StreamAssembler(SPEC, policy, EventTimeouts(idle_ms=10**9, max_out_of_orderness_ms=20))
    rows, most = 0, 0
    for portion in portions(columns, np.searchsorted(columns["time_ms"], range(500, 10_000, 500)).tolist()):
        rows += len(stream.push(portion).rows["kind"])
        in_memory = sum(isinstance(entry, OpenVisit) for entry in gc.get_objects())
        most = max(most, stream.open_visits)
        assert in_memory <= 3 * stream.open_visits + 64
    assert 0 < most < 300 and rows > 9_000


@pytest.mark.parametrize("exit_ms", [20, 50, 60])
def test_a_visit_that_ended_with_nothing_to_correct_does_not_wait_for_its_slow_row(exit_ms: int) -> None:
    stream = StreamAssembler(SPEC, FastSlow(50, 120), TIMEOUTS)
    visit = [
        Event(1, 7, 2, 3, "live", name, time_ms) for name, time_ms in (("enter", 0), ("like", 9), ("exit", exit_ms))
    ]
    stream.push(columns_of(visit))
    assert [row.kind for row in rows_as_tuples(stream.advance(61).rows)] == ["fast"]
    assert stream.open_visits == 0


@pytest.mark.parametrize(
    ("policy", "timeouts"),
    [
        (Realtime(60), TIMEOUTS),
        (RealtimeNaive(30), TIMEOUTS),
        (Full(), TIMEOUTS),
        (FastSlow(30, 60), TIMEOUTS),
        (Realtime(30), EventTimeouts(idle_ms=101, max_out_of_orderness_ms=20)),
    ],
)
def test_open_visits_of_other_rules_are_refused(policy: Policy, timeouts: EventTimeouts) -> None:
    state = StreamAssembler(SPEC, Realtime(30), TIMEOUTS).state_dict()
    with pytest.raises(UserError, match=r"assembled under realtime \[30, 100, 20\]; the job asks for"):
        StreamAssembler(SPEC, policy, timeouts).load_state_dict(state)


def test_partitions_are_neither_lost_nor_doubled() -> None:
    saved = [rank.state_dict() for rank in of_ranks(2, Full())]
    one = of_ranks(1, Full())[0]
    with pytest.raises(ValueError, match="no rank has saved open visits of partition 1"):
        one.load_state_dict(saved[:1])
    with pytest.raises(ValueError, match="two ranks have saved open visits of partition 0"):
        one.load_state_dict([*saved, saved[0]])
