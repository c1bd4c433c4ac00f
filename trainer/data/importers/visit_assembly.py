"""Assembly of visits from single events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.format.validation import Columns

_LONGEST_MS = np.iinfo(np.int32).max


@dataclass(frozen=True)
class EventCodes:
    """Codes of events: positions in ``(exposure, enter, exit, *behaviours)``.

    Attributes:
        behaviours: behaviours in label order.
        begin: code of the event that begins a visit.
    """

    behaviours: tuple[str, ...]
    begin: int

    EXPOSURE = 0
    ENTER = 1
    EXIT = 2
    FIRST_BEHAVIOUR = 3


@dataclass(frozen=True)
class AssembledVisits:
    """Result of ``assemble_visits``: visits, their events, and the positions of events without a visit."""

    visits: Columns
    events: Columns
    orphans: np.ndarray


def assemble_visits(events: Columns, codes: EventCodes, *, by_visit_id: bool, has_value: bool) -> AssembledVisits:
    """Assemble the events of some users to visits.

    A visit begins with an event ``codes.begin``. With ``by_visit_id`` all events of a (user, visit_id) are one visit,
    which starts at its first begin event. Otherwise an event belongs to the latest begin event of its (user, item), and
    the ``row`` of that event becomes the ``visit_id``. Events of the same millisecond are ordered: begin, others, exit.
    An event is an orphan if there is no begin event before it, or if that is more than 2^31 ms earlier.

    A visit ends with its last event. With ``has_value``, ``play_ms`` is the ``value`` of the last exit; otherwise it is
    the time from the enter event (or else the begin event) to that exit. It is 0 without an exit.

    Args:
        events: ``user_id, author_id, item_id, visit_id, time_ms, row`` int64, ``domain`` and ``code`` int8, ``value``
            float64, and any other columns, which a visit takes from its begin event.
        codes: meaning of ``code``.
        by_visit_id: True if the log has visit ids.
        has_value: True if the ``value`` of an exit is the time watched.

    Returns:
        ``visits`` has ``visit_id, user_id, author_id, item_id, domain, request_ms, exit_ms, play_ms, delay_B,
        value_gift`` and the other columns. ``events`` has the columns of the canonical log, with ``code``; an exposure
        and an exit are added to visits without one. ``orphans`` are positions in the argument ``events``.
    """
    # Sort by group, then time. Within a group, everything up to the next begin event is then one visit.
    group = ("user_id", "visit_id") if by_visit_id else ("user_id", "item_id")
    code = events["code"]
    rank = np.where(code == codes.begin, 0, np.where(code == codes.EXIT, 2, 1))
    order = np.lexsort((events["row"], rank, events["time_ms"], *(events[name] for name in reversed(group))))
    event = {name: column[order] for name, column in events.items()}

    position = np.arange(len(order))
    new_group = position == 0
    for name in group:
        new_group[1:] |= event[name][1:] != event[name][:-1]
    group_first = np.maximum.accumulate(np.where(new_group, position, 0))
    begins = event["code"] == codes.begin
    if by_visit_id:
        # only the first begin event of a (user, visit_id) begins a visit
        count = np.cumsum(begins)
        before_group = (count - begins)[group_first]
        begins &= count - before_group == 1
    # position of the latest begin event so far; it is an event of another group if this group has none yet
    begin_at = np.maximum.accumulate(np.where(begins, position, -1))
    orphan = (begin_at < group_first) | (event["time_ms"] - event["time_ms"][begin_at] > _LONGEST_MS)

    orphans = order[orphan]
    event = {name: column[~orphan] for name, column in event.items()}
    # a begin event is never an orphan, so its running number is that of the visit
    visit = np.cumsum(begins[~orphan]) - 1
    first = np.flatnonzero(begins[~orphan])
    start_ms = event["time_ms"][first]

    visits = {name: column[first] for name, column in event.items() if name not in ("time_ms", "row", "code", "value")}
    if not by_visit_id:
        visits["visit_id"] = event["row"][first]
    visits["request_ms"] = start_ms
    last = np.append(first[1:], len(visit)) - 1
    visits["exit_ms"] = event["time_ms"][last] if len(first) else start_ms
    visits["play_ms"] = _play(event, codes, visit, start_ms, has_value)
    for k, behaviour in enumerate(codes.behaviours, codes.FIRST_BEHAVIOUR):
        rows = np.flatnonzero(event["code"] == k)
        # events are in order of time, so the first index of each visit is its first behaviour
        with_behaviour, earliest = np.unique(visit[rows], return_index=True)
        delay = np.full(len(first), -1, np.int32)
        delay[with_behaviour] = event["time_ms"][rows[earliest]] - start_ms[with_behaviour]
        visits[f"delay_{behaviour}"] = delay
        if behaviour == "gift":
            visits["value_gift"] = np.zeros(len(first), np.float32)
            visits["value_gift"][with_behaviour] = event["value"][rows[earliest]]
    return AssembledVisits(visits, _complete_log(event, codes, visit, visits), orphans)


def _play(event: Columns, codes: EventCodes, visit: np.ndarray, start_ms: np.ndarray, has_value: bool) -> np.ndarray:
    """Return the milliseconds watched of each visit, ``[visits] int64``."""
    play = np.zeros(len(start_ms), np.int64)
    exits = np.flatnonzero(event["code"] == codes.EXIT)
    # a visit with several exits keeps the last one, because it is assigned last
    if has_value:
        play[visit[exits]] = event["value"][exits]
        return np.maximum(play, 0)
    entered = start_ms.copy()
    # reversed, so that a visit with several enters keeps the first one
    enters = np.flatnonzero(event["code"] == codes.ENTER)[::-1]
    entered[visit[enters]] = event["time_ms"][enters]
    play[visit[exits]] = event["time_ms"][exits] - entered[visit[exits]]
    return np.maximum(play, 0)


def _complete_log(event: Columns, codes: EventCodes, visit: np.ndarray, visits: Columns) -> Columns:
    """Return the canonical events; an exposure and an exit are added to visits without one."""
    count = len(visits["visit_id"])
    names = ("user_id", "author_id", "item_id", "domain", "visit_id")
    visit_parts = [visit]
    code, time_ms = [event["code"]], [event["time_ms"]]
    for missing_code, time_column in ((codes.EXPOSURE, "request_ms"), (codes.EXIT, "exit_ms")):
        without = np.setdiff1d(np.arange(count), visit[event["code"] == missing_code])
        visit_parts.append(without)
        code.append(np.full(len(without), missing_code, np.int8))
        time_ms.append(visits[time_column][without])
    visit_of_row, all_codes = np.concatenate(visit_parts), np.concatenate(code)
    value = np.zeros(len(visit_of_row), np.float32)
    exits = all_codes == codes.EXIT
    value[exits] = visits["play_ms"][visit_of_row[exits]]
    if "gift" in codes.behaviours:
        gifts = np.flatnonzero(event["code"] == codes.FIRST_BEHAVIOUR + codes.behaviours.index("gift"))
        value[gifts] = event["value"][gifts]
    return {
        **{name: visits[name][visit_of_row] for name in names},
        "code": all_codes,
        "time_ms": np.concatenate(time_ms),
        "value": value,
    }
