"""Reference of the report policies, one visit and one behaviour at a time: slow, written only from the paper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.stream.labels.policy import EventTimeouts, FastSlow, Full, Policy, Realtime


class Event(NamedTuple):
    """Event; ``event`` is its name."""

    user_id: int
    visit_id: int
    author_id: int
    item_id: int
    domain: str
    event: str
    time_ms: int


class Row(NamedTuple):
    """Training row; ``label`` and ``mask`` have one value per behaviour."""

    emit_ms: int
    user_id: int
    visit_id: int
    request_ms: int
    kind: str
    author_id: int
    item_id: int
    domain: str
    label: tuple[int, ...]
    mask: tuple[int, ...]


class StartedVisit(NamedTuple):
    """Visit that has started."""

    request_ms: int
    user_id: int
    visit_id: int
    author_id: int
    item_id: int
    domain: str


class UnusedEvent(NamedTuple):
    """Event that changes no row, and the reason."""

    reason: str
    event: Event


@dataclass
class Visit:
    """Visit; times count from its request. ``times[B]`` are all times of behaviour B, ascending."""

    first: Event
    end: int
    times: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def split_late(events: Sequence[Event], max_out_of_orderness_ms: int) -> tuple[list[Event], list[Event]]:
    """Split events into those in time and those behind the watermark."""
    in_time: list[Event] = []
    late: list[Event] = []
    latest = -(10**18)
    for event in events:
        latest = max(latest, event.time_ms)
        (late if event.time_ms < latest - max_out_of_orderness_ms else in_time).append(event)
    return in_time, late


def visits_of(events: Sequence[Event], idle_ms: int) -> tuple[list[Visit], list[Event]]:
    """Group events in time into visits; return them and the events that belong to no visit."""
    groups: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        groups[event.user_id, event.visit_id].append(event)
    visits: list[Visit] = []
    orphans: list[Event] = []
    for group in groups.values():
        rank = {"exposure": 0, "enter": 1, "exit": 3}
        group.sort(key=lambda event: (event.time_ms, rank.get(event.event, 2)))
        visit: Visit | None = None
        exited, last = False, 0
        for event in group:
            over = visit is not None and (event.time_ms > last + idle_ms or (exited and event.time_ms > last))
            if over:
                visit = None
            if visit is None:
                if event.event not in ("exposure", "enter"):
                    orphans.append(event)
                    continue
                visit, exited = Visit(event, 0), False
                visits.append(visit)
            last = event.time_ms
            exited |= event.event == "exit"
            visit.end = last - visit.first.time_ms + (0 if exited else idle_ms)
            if event.event not in rank:
                visit.times[event.event].append(last - visit.first.time_ms)
    return visits, orphans


def rows_of(visit: Visit, policy: Policy, behaviours: Sequence[str], applies: dict[str, tuple[str, ...]]) -> list[Row]:
    """Return the rows of a visit, without rows in which nothing is unmasked."""
    known = [visit.first.domain in applies[behaviour] for behaviour in behaviours]
    never = 10**18
    # A behaviour that does not apply is masked, as if it had not happened.
    times = [visit.times[name] if can_happen else [] for name, can_happen in zip(behaviours, known, strict=True)]
    first = [min(of_one, default=never) for of_one in times]
    made: list[tuple[str, int, list[bool], list[bool]]] = []

    if isinstance(policy, Full):
        made.append(("full", visit.end, [t < never for t in first], known))
    elif isinstance(policy, FastSlow):
        made.append(("fast", policy.fast_ms, [t <= policy.fast_ms for t in first], known))
        late = [policy.fast_ms < t <= policy.slow_ms for t in first]
        made.append(("slow", policy.slow_ms, late, late))
    else:
        # Ticks m = 1 .. ceil(T / tick); the last tick ends with the exit.
        reported = [not can_happen for can_happen in known]
        tick = policy.tick_ms
        m = 0
        while True:
            m += 1
            left, right = (m - 1) * tick, min(m * tick, visit.end)
            # The first tick also includes its left edge.
            in_tick = [[t for t in of_one if (left < t or t == left == 0) and t <= right] for of_one in times]
            at_end = m * tick >= visit.end
            if isinstance(policy, Realtime):
                new = [bool(at) and not told for at, told in zip(in_tick, reported, strict=True)]
                if at_end:
                    made.append(("exit", visit.end, new, [not told for told in reported]))
                else:
                    made.append(("report", right, new, new))
                reported = [told or fresh for told, fresh in zip(reported, new, strict=True)]
            else:
                made.append(("exit" if at_end else "report", right, [bool(at) for at in in_tick], known))
            if at_end:
                break

    one = visit.first
    return [
        Row(
            one.time_ms + emit,
            one.user_id,
            one.visit_id,
            one.time_ms,
            kind,
            one.author_id,
            one.item_id,
            one.domain,
            tuple(map(int, label)),
            tuple(map(int, mask)),
        )
        for kind, emit, label, mask in made
        if any(mask)
    ]


def assemble(
    events: Sequence[Event],
    policy: Policy,
    timeouts: EventTimeouts,
    behaviours: Sequence[str],
    applies: dict[str, tuple[str, ...]],
    domains: Sequence[str],
) -> tuple[list[Row], list[UnusedEvent]]:
    """Assemble events in order of arrival; return the rows in order, and the unused events in any order."""
    in_time, late = split_late(events, timeouts.max_out_of_orderness_ms)
    visits, orphans = visits_of([event for event in in_time if event.domain in domains], timeouts.idle_ms)
    rows = [row for visit in visits for row in rows_of(visit, policy, behaviours, applies)]
    unused = [UnusedEvent("late", event) for event in late if event.domain in domains]
    unused += [UnusedEvent("no_open_visit", event) for event in orphans]
    return sorted(rows, key=lambda row: row[:4]), unused


def started(events: Sequence[Event], timeouts: EventTimeouts, domains: Sequence[str]) -> list[StartedVisit]:
    """Return the started visits of events in order of arrival, sorted by request, user and visit."""
    in_time, _ = split_late(events, timeouts.max_out_of_orderness_ms)
    visits, _ = visits_of([event for event in in_time if event.domain in domains], timeouts.idle_ms)
    firsts = [visit.first for visit in visits]
    return sorted(
        StartedVisit(first.time_ms, first.user_id, first.visit_id, first.author_id, first.item_id, first.domain)
        for first in firsts
    )
