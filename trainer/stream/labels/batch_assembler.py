"""Vectorised assembler: computes all rows of a stored log at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.sorting import time_order
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import (
    END_OF_TIME,
    EXIT_ROW,
    FAST,
    FULL,
    REPORT,
    SLOW,
    AssembledRows,
    concatenate,
)
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Full, Policy, Realtime
from trainer.stream.labels.visit_grouping import GroupedVisits, group_visits


def assemble_batch(
    spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, events: Columns, domains: Sequence[str] | None = None
) -> AssembledRows:
    """Assemble all rows of a partition; visits without an exit end after the idle timeout.

    Args:
        spec: description of the dataset.
        policy: report policy.
        timeouts: limits for late events and for idle visits.
        events: columns of ``EVENT_TYPES``, in order of arrival.
        domains: domains whose visits become rows, ``spec.candidates`` by default.
    """
    visits = group_visits(spec, events, timeouts, domains)
    return AssembledRows(visit_rows(visits, policy), visits.started(), concatenate(visits.unused))


def visit_rows(visits: GroupedVisits, policy: Policy) -> Rows:
    """Return the rows of visits under a policy, in the form and order of ``AssembledRows.rows``."""
    if isinstance(policy, Full):
        parts = [_full(visits)]
    elif isinstance(policy, FastSlow):
        parts = _fast_slow(visits, policy)
    elif isinstance(policy, Realtime):
        parts = _realtime(visits, policy)
    else:
        parts = [_ticks(visits, policy.tick_ms)]
    rows = concatenate(parts)
    # A row without an unmasked behaviour would train nothing.
    at = np.flatnonzero(rows["mask"].any(axis=1))
    # Visits are sorted by user, visit and request, and the sort by time is stable: this breaks the ties.
    order = at[time_order(rows["emit_ms"][at], rows["at"][at])]
    return {name: np.take(column, order, axis=0) for name, column in rows.items() if name != "at"}


def _rows(
    visits: GroupedVisits, at: np.ndarray, kind: int, emit_ms: np.ndarray, label: np.ndarray, mask: np.ndarray
) -> Rows:
    """Return rows of the visits at positions ``at``; ``label`` and ``mask`` are ``[n, behaviours]``, bool or 0/1."""
    return {
        "at": at,
        **{name: column[at] for name, column in visits.columns.items()},
        "kind": np.full(len(at), kind, np.uint8),
        "request_ms": visits.request_ms[at],
        "emit_ms": emit_ms,
        "label": label.astype(np.uint8),
        "mask": mask.astype(np.uint8),
    }


def _full(visits: GroupedVisits) -> Rows:
    """Return one row for every visit, at its end."""
    every = np.arange(len(visits.end_ms))
    return _rows(visits, every, FULL, visits.end_ms, visits.first_ms() < END_OF_TIME, visits.applies)


def _fast_slow(visits: GroupedVisits, policy: FastSlow) -> list[Rows]:
    """Return the fast rows, and the slow rows with the positives that the fast rows denied."""
    every = np.arange(len(visits.end_ms))
    first_ms = visits.first_ms()
    fast_ms, slow_ms = visits.request_ms + policy.fast_ms, visits.request_ms + policy.slow_ms
    early = first_ms <= fast_ms[:, None]
    missed = ~early & (first_ms <= slow_ms[:, None])
    return [
        _rows(visits, every, FAST, fast_ms, early, visits.applies),
        _rows(visits, every, SLOW, slow_ms, missed, missed),
    ]


def _realtime(visits: GroupedVisits, policy: Realtime) -> list[Rows]:
    """Return the report rows of first positives, and the exit rows of the remaining behaviours."""
    every = np.arange(len(visits.end_ms))
    first_ms = visits.first_ms()
    happened = first_ms < END_OF_TIME
    # A first positive is reported at the end of its tick, unless the visit ends before or at that time.
    visit, behaviour = np.nonzero(happened)
    reported_ms = _tick_end(visits.request_ms[visit], first_ms[visit, behaviour], policy.tick_ms)
    before_end = np.flatnonzero(reported_ms < visits.end_ms[visit])
    visit, behaviour, reported_ms = visit[before_end], behaviour[before_end], reported_ms[before_end]

    # First positives of one tick of a visit share a report row.
    order = np.lexsort((reported_ms, visit))
    same = (np.diff(visit[order]) == 0) & (np.diff(reported_ms[order]) == 0)
    # ``new`` marks the first entry of each report row, so its running count is the row number.
    new = np.append(np.ones(min(len(order), 1), bool), ~same)
    row = np.cumsum(new) - 1
    fresh = np.zeros((int(new.sum()), happened.shape[1]), np.uint8)
    fresh[row, behaviour[order]] = 1
    report = order[new]

    # The exit row holds only behaviours that no report has unmasked.
    rest = visits.applies > 0
    rest[visit, behaviour] = False
    return [
        _rows(visits, visit[report], REPORT, reported_ms[report], fresh, fresh),
        _rows(visits, every, EXIT_ROW, visits.end_ms, happened & rest, rest),
    ]


def _ticks(visits: GroupedVisits, tick_ms: int) -> Rows:
    """Return a row for every tick of every visit; the last tick ends with the visit."""
    length = visits.end_ms - visits.request_ms
    # A visit of length 0 still has one tick.
    ticks = np.maximum(-(-length // tick_ms), 1)
    first_row = np.cumsum(ticks) - ticks
    visit = np.repeat(np.arange(len(ticks)), ticks)
    tick = np.arange(len(visit)) - first_row[visit] + 1
    last = tick == ticks[visit]
    emit_ms = np.where(last, visits.end_ms[visit], visits.request_ms[visit] + tick * tick_ms)

    # Here all behaviours count, not only the first of each kind.
    happened_by = _tick_end(visits.request_ms[visits.visit], visits.time_ms, tick_ms)
    tick_of_event = (happened_by - visits.request_ms[visits.visit]) // tick_ms
    label = np.zeros((len(visit), visits.applies.shape[1]), np.uint8)
    label[first_row[visits.visit] + tick_of_event - 1, visits.behaviour] = 1
    rows = _rows(visits, visit, REPORT, emit_ms, label, visits.applies[visit])
    rows["kind"][last] = EXIT_ROW
    return rows


def _tick_end(request_ms: np.ndarray, time_ms: np.ndarray, tick_ms: int) -> np.ndarray:
    """Return the end of the tick in which each time lies."""
    return request_ms + np.maximum(-(-(time_ms - request_ms) // tick_ms), 1) * tick_ms
