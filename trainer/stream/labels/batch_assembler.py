"""The vectorised assembler: all rows of a stored log at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.sorting import time_order
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import END_OF_TIME, EXIT_ROW, FAST, FULL, REPORT, SLOW, Assembled, concatenate
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Full, Policy, Realtime
from trainer.stream.labels.visit_grouping import Visits, group_visits


def assemble_batch(
    spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, events: Columns, domains: Sequence[str] | None = None
) -> Assembled:
    """All rows of a partition's events, as if the log went on for ever without another event.

    Args:
        spec: of the dataset.
        policy: which rows.
        timeouts: what is late, and when a visit without an exit has ended.
        events: columns of ``rows.EVENT_TYPES``, in the order in which they arrived.
        domains: those whose visits become rows, ``spec.candidates`` by default.
    """
    visits = group_visits(spec, events, timeouts, domains)
    return Assembled(visit_rows(visits, policy), visits.begun(), concatenate(visits.aside))


def visit_rows(visits: Visits, policy: Policy) -> Rows:
    """The rows of visits under a policy, as ``rows.Assembled`` describes them."""
    if isinstance(policy, Full):
        parts = [_full(visits)]
    elif isinstance(policy, FastSlow):
        parts = _fast_slow(visits, policy)
    elif isinstance(policy, Realtime):
        parts = _realtime(visits, policy)
    else:
        parts = [_ticks(visits, policy.tick_ms)]
    rows = concatenate(parts)
    seen = rows["mask"].any(axis=1)
    # Visits are in order of user, visit and request, which breaks the ties.
    at = np.flatnonzero(seen)
    order = at[time_order(rows["emit_ms"][at], rows["at"][at])]
    return {name: np.take(column, order, axis=0) for name, column in rows.items() if name != "at"}


def _rows(visits: Visits, at: np.ndarray, kind: int, emit_ms: np.ndarray, label: np.ndarray, mask: np.ndarray) -> Rows:
    """Rows of the visits at positions ``at``; ``label`` and ``mask`` are ``[n, behaviours]``, bool or 0 and 1."""
    return {
        "at": at,
        **{name: column[at] for name, column in visits.columns.items()},
        "kind": np.full(len(at), kind, np.uint8),
        "request_ms": visits.request_ms[at],
        "emit_ms": emit_ms,
        "label": label.astype(np.uint8),
        "mask": mask.astype(np.uint8),
    }


def _full(visits: Visits) -> Rows:
    every = np.arange(len(visits.end_ms))
    return _rows(visits, every, FULL, visits.end_ms, visits.first_ms() < END_OF_TIME, visits.applies)


def _fast_slow(visits: Visits, policy: FastSlow) -> list[Rows]:
    every = np.arange(len(visits.end_ms))
    first_ms = visits.first_ms()
    fast_ms, slow_ms = visits.request_ms + policy.fast_ms, visits.request_ms + policy.slow_ms
    early = first_ms <= fast_ms[:, None]
    missed = ~early & (first_ms <= slow_ms[:, None])
    return [
        _rows(visits, every, FAST, fast_ms, early, visits.applies),
        _rows(visits, every, SLOW, slow_ms, missed, missed),
    ]


def _realtime(visits: Visits, policy: Realtime) -> list[Rows]:
    every = np.arange(len(visits.end_ms))
    first_ms = visits.first_ms()
    happened = first_ms < END_OF_TIME
    visit, behaviour = np.nonzero(happened)
    reported_ms = _tick_end(visits.request_ms[visit], first_ms[visit, behaviour], policy.tick_ms)
    before_end = np.flatnonzero(reported_ms < visits.end_ms[visit])
    visit, behaviour, reported_ms = visit[before_end], behaviour[before_end], reported_ms[before_end]

    order = np.lexsort((reported_ms, visit))
    same = (np.diff(visit[order]) == 0) & (np.diff(reported_ms[order]) == 0)
    new = np.append(np.ones(min(len(order), 1), bool), ~same)
    row = np.cumsum(new) - 1
    fresh = np.zeros((int(new.sum()), happened.shape[1]), np.uint8)
    fresh[row, behaviour[order]] = 1
    report = order[new]

    rest = visits.applies > 0
    rest[visit, behaviour] = False
    return [
        _rows(visits, visit[report], REPORT, reported_ms[report], fresh, fresh),
        _rows(visits, every, EXIT_ROW, visits.end_ms, happened & rest, rest),
    ]


def _ticks(visits: Visits, tick_ms: int) -> Rows:
    """A row for every tick of every visit, the last one at its end."""
    length = visits.end_ms - visits.request_ms
    ticks = np.maximum(-(-length // tick_ms), 1)
    first_row = np.cumsum(ticks) - ticks
    visit = np.repeat(np.arange(len(ticks)), ticks)
    tick = np.arange(len(visit)) - first_row[visit] + 1
    last = tick == ticks[visit]
    emit_ms = np.where(last, visits.end_ms[visit], visits.request_ms[visit] + tick * tick_ms)

    happened_by = _tick_end(visits.request_ms[visits.visit], visits.time_ms, tick_ms)
    of_tick = (happened_by - visits.request_ms[visits.visit]) // tick_ms
    label = np.zeros((len(visit), visits.applies.shape[1]), np.uint8)
    label[first_row[visits.visit] + of_tick - 1, visits.behaviour] = 1
    rows = _rows(visits, visit, REPORT, emit_ms, label, visits.applies[visit])
    rows["kind"][last] = EXIT_ROW
    return rows


def _tick_end(request_ms: np.ndarray, time_ms: np.ndarray, tick_ms: int) -> np.ndarray:
    """End of the tick in which a time lies."""
    return request_ms + np.maximum(-(-(time_ms - request_ms) // tick_ms), 1) * tick_ms
