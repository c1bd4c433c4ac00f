"""Groups the events of a stored log into visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows
from trainer.data.format.sorting import stable_order
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import masks
from trainer.stream.labels.assembled_rows import (
    END_OF_TIME,
    ENTER,
    EXIT,
    FIRST_BEHAVIOUR,
    ID_COLUMNS,
    LATE,
    NO_OPEN_VISIT,
    select_unused,
)
from trainer.stream.labels.policy import EventTimeouts


@dataclass(frozen=True)
class GroupedVisits:
    """Visits as ``trainer.stream.labels.policy`` defines them, in order of user, visit and request.

    Attributes:
        columns: ``visit_id, user_id, author_id, item_id`` int64 and ``domain`` uint8, ``[n]``.
        request_ms: ``[n] int64``.
        end_ms: ``[n] int64``.
        applies: ``[n, behaviours] uint8``, 1 where the behaviour can happen in the visit's domain.
        visit: position of the visit of each behaviour that happened and applies, ``[m] int64``, increasing.
        behaviour: position of the behaviour in ``spec.behaviours``, ``[m] int64``.
        time_ms: time of the behaviour, ``[m] int64``, increasing within a visit.
        value: value of the behaviour's event, ``[m] float32``.
        unused: events that belong to no visit, in the form of ``AssembledRows.unused``.
    """

    columns: Columns
    request_ms: np.ndarray
    end_ms: np.ndarray
    applies: np.ndarray
    visit: np.ndarray
    behaviour: np.ndarray
    time_ms: np.ndarray
    value: np.ndarray
    unused: tuple[Columns, ...]

    def started(self) -> Rows:
        """Return the starts of the visits, in the form and order of ``AssembledRows.started``."""
        order = stable_order(self.request_ms)
        return {name: column[order] for name, column in {**self.columns, "request_ms": self.request_ms}.items()}

    def first_ms(self) -> np.ndarray:
        """Return the first time of each behaviour, ``[n, behaviours] int64``, ``END_OF_TIME`` for never."""
        first = np.full(self.applies.shape, END_OF_TIME, np.int64)
        np.minimum.at(first, (self.visit, self.behaviour), self.time_ms)
        return first

    def select(self, keep: np.ndarray) -> GroupedVisits:
        """Return the visits where ``keep [n] bool`` is set, without unused events."""
        place = np.cumsum(keep) - 1
        kept = keep[self.visit]
        return GroupedVisits(
            columns={name: column[keep] for name, column in self.columns.items()},
            request_ms=self.request_ms[keep],
            end_ms=self.end_ms[keep],
            applies=self.applies[keep],
            visit=place[self.visit[kept]],
            behaviour=self.behaviour[kept],
            time_ms=self.time_ms[kept],
            value=self.value[kept],
            unused=(),
        )


def group_visits(
    spec: DatasetSpec, events: Columns, timeouts: EventTimeouts, domains: Sequence[str] | None = None
) -> GroupedVisits:
    """Group the events of a partition into visits.

    Args:
        spec: description of the dataset.
        events: columns of ``EVENT_TYPES``, in order of arrival.
        timeouts: limits for late events and for idle visits.
        domains: domains whose events count, ``spec.candidates`` by default; other events only move the watermark.
    """
    late = is_late(events["time_ms"], timeouts.max_out_of_orderness_ms)
    counted = in_domains(spec, events["domain"], domains)
    # The common case copies nothing.
    if counted.all() and not late.any():
        unused, event = [], events
    else:
        unused = [select_unused(events, np.flatnonzero(late & counted), LATE)]
        event = {name: column[counted & ~late] for name, column in events.items()}
    # Simultaneous events are ordered as exposure, enter, behaviours, exit.
    order = stable_order(event["time_ms"] * 4 + simultaneous_rank(event["event"]))
    # Stable sorts from the least to the most significant key.
    for name in ("visit_id", "user_id"):
        order = order[stable_order(event[name][order])]
    event = {name: np.take(column, order) for name, column in event.items()}

    code, time_ms = event["event"], event["time_ms"]
    opens = code <= ENTER
    begins, within = _segments(event, opens, timeouts.idle_ms)
    unused.append(select_unused(event, np.flatnonzero(~within), NO_OPEN_VISIT))

    first = np.flatnonzero(begins)
    visit = np.cumsum(begins) - 1
    # An event between two visits has the number of the earlier one, so only events inside can be the last of a visit.
    inside = np.flatnonzero(within)
    last = inside[np.flatnonzero(np.diff(visit[inside], append=len(first)))] if len(inside) else inside
    # Without an exit a visit ends by the idle timeout after its last event.
    end_ms = time_ms[last] + np.where(code[last] == EXIT, 0, timeouts.idle_ms)

    columns = {name: event[name][first] for name in ID_COLUMNS}
    columns["domain"] = event["domain"][first].astype(np.uint8)
    applies = masks(spec, columns["domain"])
    at = np.flatnonzero(within & (code >= FIRST_BEHAVIOUR))
    behaviour = code[at].astype(np.int64) - FIRST_BEHAVIOUR
    # A behaviour outside of its domain keeps the visit open, but gives no label.
    can_happen = applies[visit[at], behaviour] > 0
    at, behaviour = at[can_happen], behaviour[can_happen]
    return GroupedVisits(
        columns=columns,
        request_ms=time_ms[first],
        end_ms=end_ms,
        applies=applies,
        visit=visit[at],
        behaviour=behaviour,
        time_ms=time_ms[at],
        value=event["value"][at],
        unused=tuple(unused),
    )


def is_late(time_ms: np.ndarray, max_out_of_orderness_ms: int, watermark_ms: int = -END_OF_TIME) -> np.ndarray:
    """Return a mask of the events behind the watermark at their arrival, ``[n] bool``.

    ``watermark_ms`` is the watermark before the first of these events.
    """
    if not len(time_ms):
        return np.zeros(0, bool)
    return time_ms < np.maximum(np.maximum.accumulate(time_ms) - max_out_of_orderness_ms, watermark_ms)


def in_domains(spec: DatasetSpec, domain: np.ndarray, domains: Sequence[str] | None) -> np.ndarray:
    """Return a mask of the events in ``domains`` (``spec.candidates`` if None), ``[n] bool``."""
    wanted = spec.candidates if domains is None else domains
    return np.array([name in wanted for name in DOMAINS])[domain]


def simultaneous_rank(code: np.ndarray) -> np.ndarray:
    """Return the rank of event codes within a millisecond, ``[n] int64``: exposure, enter, behaviours, exit."""
    return np.where(code <= ENTER, code, np.where(code == EXIT, 3, 2)).astype(np.int64)


def _segments(event: Columns, opens: np.ndarray, idle_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks, ``[n] bool`` each: events that start a visit, and events that belong to a visit.

    ``event`` is in order of user, visit and time. An event belongs to a visit if the last opening event before it (or
    the event itself) is not earlier than the last position at which the visit was closed.
    """
    place = np.arange(len(opens))
    time_ms = event["time_ms"]
    closed = place == 0
    closed[1:] |= (np.diff(event["user_id"]) != 0) | (np.diff(event["visit_id"]) != 0)
    gap = np.diff(time_ms)
    # An exit is the last event of its millisecond: it closes the visit for all later events.
    closed[1:] |= (gap > idle_ms) | ((event["event"][:-1] == EXIT) & (gap > 0))
    last_opened = np.maximum.accumulate(np.where(opens, place, -1))
    last_closed = np.maximum.accumulate(np.where(closed, place, -1))
    within = last_opened >= last_closed
    # An opening event inside of an open visit does not start another one.
    begins = opens & (np.append(-1, last_opened[:-1]) < last_closed)
    return begins, within
