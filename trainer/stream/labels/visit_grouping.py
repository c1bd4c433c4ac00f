"""Which events of a stored log make a visit."""

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
    take_aside,
)
from trainer.stream.labels.policy import EventTimeouts


@dataclass(frozen=True)
class Visits:
    """Visits as ``trainer.stream.labels.policy`` defines them, in order of user, visit and request.

    Attributes:
        columns: ``visit_id, user_id, author_id, item_id`` int64 and ``domain`` uint8, ``[n]``.
        request_ms: ``[n] int64``.
        end_ms: ``[n] int64``.
        applies: ``[n, behaviours] uint8``, 1 where the behaviour can happen in the visit's domain.
        visit: position of the visit of every behaviour that happened and applies, ``[m] int64``, increasing.
        behaviour: its position in ``spec.behaviours``, ``[m] int64``.
        time_ms: ``[m] int64``, increasing within a visit.
        value: ``[m] float32``.
        aside: events that belong to no visit, in the form of ``rows.Assembled.aside``.
    """

    columns: Columns
    request_ms: np.ndarray
    end_ms: np.ndarray
    applies: np.ndarray
    visit: np.ndarray
    behaviour: np.ndarray
    time_ms: np.ndarray
    value: np.ndarray
    aside: tuple[Columns, ...]

    def begun(self) -> Rows:
        """The visits as they began, in the form and order of ``rows.Assembled.begun``."""
        order = stable_order(self.request_ms)
        return {name: column[order] for name, column in {**self.columns, "request_ms": self.request_ms}.items()}

    def first_ms(self) -> np.ndarray:
        """When each behaviour happened first, ``[n, behaviours] int64``, ``END_OF_TIME`` for never."""
        first = np.full(self.applies.shape, END_OF_TIME, np.int64)
        np.minimum.at(first, (self.visit, self.behaviour), self.time_ms)
        return first

    def only(self, keep: np.ndarray) -> Visits:
        """The visits where ``keep [n] bool`` is set; nothing is set aside in them."""
        place = np.cumsum(keep) - 1
        kept = keep[self.visit]
        return Visits(
            columns={name: column[keep] for name, column in self.columns.items()},
            request_ms=self.request_ms[keep],
            end_ms=self.end_ms[keep],
            applies=self.applies[keep],
            visit=place[self.visit[kept]],
            behaviour=self.behaviour[kept],
            time_ms=self.time_ms[kept],
            value=self.value[kept],
            aside=(),
        )


def group_visits(
    spec: DatasetSpec, events: Columns, timeouts: EventTimeouts, domains: Sequence[str] | None = None
) -> Visits:
    """Put the events of a partition together to visits.

    Args:
        spec: of the dataset.
        events: columns of ``rows.EVENT_TYPES``, in the order in which they arrived.
        timeouts: what is late, and when a visit without an exit has ended.
        domains: those whose events count, ``spec.candidates`` by default; events of others move the watermark only.
    """
    late = is_late(events["time_ms"], timeouts.max_out_of_orderness_ms)
    counted = of_domains(spec, events["domain"], domains)
    if counted.all() and not late.any():
        asides, event = [], events
    else:
        asides = [take_aside(events, np.flatnonzero(late & counted), LATE)]
        event = {name: column[counted & ~late] for name, column in events.items()}
    # Simultaneous events are taken as exposure, enter, behaviours, exit.
    order = stable_order(event["time_ms"] * 4 + simultaneous_rank(event["event"]))
    for name in ("visit_id", "user_id"):
        order = order[stable_order(event[name][order])]
    event = {name: np.take(column, order) for name, column in event.items()}

    code, time_ms = event["event"], event["time_ms"]
    opens = code <= ENTER
    begins, within = _segments(event, opens, timeouts.idle_ms)
    asides.append(take_aside(event, np.flatnonzero(~within), NO_OPEN_VISIT))

    first = np.flatnonzero(begins)
    visit = np.cumsum(begins) - 1
    # Events between two visits carry the number of the first one: the last event of a visit is the last one within.
    inside = np.flatnonzero(within)
    last = inside[np.flatnonzero(np.diff(visit[inside], append=len(first)))] if len(inside) else inside
    end_ms = time_ms[last] + np.where(code[last] == EXIT, 0, timeouts.idle_ms)

    columns = {name: event[name][first] for name in ID_COLUMNS}
    columns["domain"] = event["domain"][first].astype(np.uint8)
    applies = masks(spec, columns["domain"])
    at = np.flatnonzero(within & (code >= FIRST_BEHAVIOUR))
    behaviour = code[at].astype(np.int64) - FIRST_BEHAVIOUR
    can_happen = applies[visit[at], behaviour] > 0
    at, behaviour = at[can_happen], behaviour[can_happen]
    return Visits(
        columns=columns,
        request_ms=time_ms[first],
        end_ms=end_ms,
        applies=applies,
        visit=visit[at],
        behaviour=behaviour,
        time_ms=time_ms[at],
        value=event["value"][at],
        aside=tuple(asides),
    )


def is_late(time_ms: np.ndarray, max_out_of_orderness_ms: int, watermark_ms: int = -END_OF_TIME) -> np.ndarray:
    """Which events were behind the watermark when they arrived, ``[n] bool``; ``watermark_ms`` is that of before."""
    if not len(time_ms):
        return np.zeros(0, bool)
    return time_ms < np.maximum(np.maximum.accumulate(time_ms) - max_out_of_orderness_ms, watermark_ms)


def of_domains(spec: DatasetSpec, domain: np.ndarray, domains: Sequence[str] | None) -> np.ndarray:
    """Which events are of ``domains`` (``spec.candidates`` if None), ``[n] bool``."""
    wanted = spec.candidates if domains is None else domains
    return np.array([name in wanted for name in DOMAINS])[domain]


def simultaneous_rank(code: np.ndarray) -> np.ndarray:
    """Order of event codes within a millisecond, ``[n] int64``: exposure, enter, behaviours, exit."""
    return np.where(code <= ENTER, code, np.where(code == EXIT, 3, 2)).astype(np.int64)


def _segments(event: Columns, opens: np.ndarray, idle_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """Which events begin a visit and which belong to one, ``[n] bool`` each.

    ``event`` is in order of user, visit and time. The visit of an event is open if the latest of what opened and what
    closed it opened it.
    """
    place = np.arange(len(opens))
    time_ms = event["time_ms"]
    closed = place == 0
    closed[1:] |= (np.diff(event["user_id"]) != 0) | (np.diff(event["visit_id"]) != 0)
    gap = np.diff(time_ms)
    # An exit is the last of its millisecond: it closes the visit for what comes after that.
    closed[1:] |= (gap > idle_ms) | ((event["event"][:-1] == EXIT) & (gap > 0))
    last_opened = np.maximum.accumulate(np.where(opens, place, -1))
    last_closed = np.maximum.accumulate(np.where(closed, place, -1))
    within = last_opened >= last_closed
    begins = opens & (np.append(-1, last_opened[:-1]) < last_closed)
    return begins, within
