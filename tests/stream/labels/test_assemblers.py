"""Tests of both assemblers against the reference on random logs, and of the invariants of the policies."""

from __future__ import annotations

import io
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stream import reference
from tests.stream.random_logs import (
    BEHAVIOURS,
    LIVE_ONLY,
    POLICIES,
    SPEC,
    TIMEOUTS,
    columns_of,
    logs,
    portions,
    rows_as_tuples,
    started_as_tuples,
    unused_as_tuples,
)
from tests.stream.reference import Event, Row
from trainer.data.format.schema import row_columns
from trainer.stream.labels.assembled_rows import STARTED_COLUMNS, AssembledRows
from trainer.stream.labels.batch_assembler import assemble_batch
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Full, Policy, Realtime, RealtimeNaive
from trainer.stream.labels.streaming_assembler import State, StreamAssembler

VISIT = ("user_id", "visit_id", "request_ms")
EVENTS_SHUFFLED_FREELY = EventTimeouts(idle_ms=100, max_out_of_orderness_ms=10_000)

many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
some = settings(many, max_examples=100)


def by_reference(events: list[Event], policy: Policy, timeouts: EventTimeouts = TIMEOUTS) -> list[Row]:
    return reference.assemble(events, policy, timeouts, BEHAVIOURS, SPEC.applies, SPEC.candidates)[0]


def as_tuples(parts: list[AssembledRows]) -> tuple[list[Row], list[reference.UnusedEvent]]:
    rows = [row for part in parts for row in rows_as_tuples(part.rows)]
    return rows, sorted(unused for part in parts for unused in unused_as_tuples(part.unused))


def through_a_file(state: State) -> State:
    """Write a state as arrays that are not pickled, and read it back."""
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


@many
@given(events=logs(), data=st.data())
def test_both_assemblers_give_the_rows_of_the_reference(events: list[Event], data: st.DataObject) -> None:
    """The stream comes in any portions, and the state is saved and restored between two of them."""
    columns = columns_of(events)
    cuts = data.draw(st.lists(st.integers(0, len(events)), max_size=6))
    restored = data.draw(st.integers(0, len(cuts)))
    domains = data.draw(st.sampled_from([None, LIVE_ONLY]))
    for policy in POLICIES:
        wanted = domains or SPEC.candidates
        rows, unused = reference.assemble(events, policy, TIMEOUTS, BEHAVIOURS, SPEC.applies, wanted)

        batch = assemble_batch(SPEC, policy, TIMEOUTS, columns, domains)
        assert as_tuples([batch]) == (rows, sorted(unused))
        started = reference.started(events, TIMEOUTS, wanted)
        assert started_as_tuples(batch.started) == started

        stream = StreamAssembler(SPEC, policy, TIMEOUTS, domains)
        parts = []
        for number, portion in enumerate(portions(columns, cuts)):
            if number == restored:
                state = through_a_file(stream.state_dict())
                stream = StreamAssembler(SPEC, policy, TIMEOUTS, domains)
                stream.load_state_dict(state)
            parts.append(stream.push(portion))
            assert (parts[-1].rows["emit_ms"] < stream.watermark_ms).all()
            so_far = [visit for part in parts for visit in started_as_tuples(part.started)]
            assert so_far == [visit for visit in started if visit.request_ms < stream.watermark_ms], (
                "a visit is reported as soon as the watermark has passed its request"
            )
        parts.append(stream.advance())
        assert as_tuples(parts) == (rows, sorted(unused))
        assert [visit for part in parts for visit in started_as_tuples(part.started)] == started
        assert stream.open_visits == stream.waiting_events == 0
        for name, column in batch.rows.items():
            assert all(part.rows[name].dtype == column.dtype == row_columns(SPEC)[name][0] for part in parts)
        for name, column in batch.started.items():
            assert all(part.started[name].dtype == column.dtype == row_columns(SPEC)[name][0] for part in parts)
        assert all(part.started.keys() == batch.started.keys() == set(STARTED_COLUMNS) for part in parts)


@some
@given(events=logs())
def test_realtime_reports_every_behaviour_of_a_visit_once(events: list[Event]) -> None:
    columns = columns_of(events)
    rows = rows_as_tuples(assemble_batch(SPEC, Realtime(30), TIMEOUTS, columns).rows)
    full = rows_as_tuples(assemble_batch(SPEC, Full(), TIMEOUTS, columns).rows)
    reported: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    positive: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(len(BEHAVIOURS), np.int64))
    for row in rows:
        visit = tuple(getattr(row, name) for name in VISIT)
        reported[visit].update(k for k, unmasked in enumerate(row.mask) if unmasked)
        positive[visit] += row.label
        negatives = [unmasked and not label for label, unmasked in zip(row.label, row.mask, strict=True)]
        assert row.kind == "exit" or not any(negatives)
    assert {tuple(getattr(row, name) for name in VISIT) for row in full} == reported.keys()
    for row in full:
        visit = tuple(getattr(row, name) for name in VISIT)
        assert reported[visit] == {k: 1 for k, applies in enumerate(row.mask) if applies}
        assert tuple(positive[visit]) == row.label
        ends = [
            other.emit_ms for other in rows if other.kind == "exit" and tuple(getattr(other, n) for n in VISIT) == visit
        ]
        assert all(emit == row.emit_ms for emit in ends)


@some
@given(events=logs())
def test_slow_rows_hold_only_what_the_fast_row_denied(events: list[Event]) -> None:
    rows = rows_as_tuples(assemble_batch(SPEC, FastSlow(50, 120), TIMEOUTS, columns_of(events)).rows)
    fast = {tuple(getattr(row, name) for name in VISIT): row for row in rows if row.kind == "fast"}
    slow = [row for row in rows if row.kind == "slow"]
    assert len(fast) + len(slow) == len(rows) and len(slow) == len(
        {(row.user_id, row.visit_id, row.request_ms) for row in slow}
    )
    for row in slow:
        denied = fast[row.user_id, row.visit_id, row.request_ms]
        assert row.label == row.mask and sum(row.label) > 0
        assert all(denied.mask[k] and not denied.label[k] for k, late in enumerate(row.label) if late)


@some
@given(events=logs(), until=st.integers(0, 450))
def test_rows_know_nothing_of_what_happens_after_they_are_emitted(events: list[Event], until: int) -> None:
    """So they know only labels of the time after the request: their ids are those of the first event."""
    past = [event for event in events if event.time_ms <= until]
    for policy in POLICIES:
        everything = assemble_batch(SPEC, policy, EVENTS_SHUFFLED_FREELY, columns_of(events))
        known = assemble_batch(SPEC, policy, EVENTS_SHUFFLED_FREELY, columns_of(past))
        rows, rows_then = rows_as_tuples(everything.rows), rows_as_tuples(known.rows)
        assert [row for row in rows if row.emit_ms <= until] == [row for row in rows_then if row.emit_ms <= until]
        assert set(everything.rows) == {*VISIT, "author_id", "item_id", "domain", "kind", "emit_ms", "label", "mask"}
        for row in rows:
            started = (row.user_id, row.visit_id, row.request_ms, row.author_id, row.item_id)
            assert started in {
                (event.user_id, event.visit_id, event.time_ms, event.author_id, event.item_id)
                for event in events
                if event.event in ("exposure", "enter")
            }
            assert row.emit_ms >= row.request_ms


@some
@given(events=logs(), data=st.data())
def test_duplicates_change_nothing(events: list[Event], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(events), max_size=5)) if events else []
    for policy in POLICIES:
        once = assemble_batch(SPEC, policy, EVENTS_SHUFFLED_FREELY, columns_of(events))
        twice = assemble_batch(SPEC, policy, EVENTS_SHUFFLED_FREELY, columns_of(events + again))
        assert rows_as_tuples(once.rows) == rows_as_tuples(twice.rows)


def log_of(*events: tuple[str, int]) -> list[Event]:
    return [Event(1, 7, 2, 3, "live", name, time_ms) for name, time_ms in events]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Full(), [("full", 95, "111", "111")]),
        (FastSlow(50, 120), [("fast", 50, "100", "111"), ("slow", 120, "011", "011")]),
        (
            Realtime(30),
            [("report", 30, "100", "100"), ("report", 60, "010", "010"), ("exit", 95, "001", "001")],
        ),
        (
            RealtimeNaive(30),
            [
                ("report", 30, "100", "111"),
                ("report", 60, "110", "111"),
                ("report", 90, "000", "111"),
                ("exit", 95, "001", "111"),
            ],
        ),
    ],
)
def test_a_visit_by_hand(policy: Policy, expected: list[tuple[str, int, str, str]]) -> None:
    """A click at 0 and at 55, a like at 51, a gift at the time of the exit, and another like after it."""
    events = log_of(
        ("exposure", 0),
        ("enter", 0),
        ("click", 0),
        ("like", 51),
        ("click", 55),
        ("exit", 95),
        ("gift", 95),
        ("like", 96),
    )
    made = assemble_batch(SPEC, policy, TIMEOUTS, columns_of(events))
    assert [
        (row.kind, row.emit_ms, "".join(map(str, row.label)), "".join(map(str, row.mask)))
        for row in rows_as_tuples(made.rows)
    ] == expected
    assert [(unused.reason, unused.event.event) for unused in unused_as_tuples(made.unused)] == [
        ("no_open_visit", "like")
    ]
    assert rows_as_tuples(made.rows) == by_reference(events, policy)


def test_a_visit_without_an_exit_ends_when_it_has_been_idle() -> None:
    stream = StreamAssembler(SPEC, Realtime(30), EventTimeouts(idle_ms=100, max_out_of_orderness_ms=0))
    first = stream.push(columns_of(log_of(("exposure", 0), ("click", 40))))
    assert rows_as_tuples(first.rows) == []
    assert [row.kind for row in rows_as_tuples(stream.advance(140).rows)] == ["report"]
    ended = stream.advance(141)
    assert [(row.kind, row.emit_ms) for row in rows_as_tuples(ended.rows)] == [("exit", 140)]
    assert stream.counts == {"events": 2, "late": 0, "no_open_visit": 0, "visits": 1, "timed_out": 1}
    late = stream.push(columns_of(log_of(("exit", 139), ("like", 141))))
    assert [unused.reason for unused in unused_as_tuples(late.unused)] == ["late"]
    assert [unused.reason for unused in unused_as_tuples(stream.advance().unused)] == ["no_open_visit"]
