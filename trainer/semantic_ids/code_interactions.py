"""Interactions of users with segments: watch time, exposures and events, attributed to what was on air.

The event log of a dataset is read partition by partition. A partition has all events of its users, so the sums over a
user and a code are complete within it, and nothing but sums is kept.

* An **event** belongs to the segment that was on air in its room at its time. An event at the very end of its visit has
  no time of its own, since importers put what a visit counts there: it is spread over the segments that the visit
  watched, in proportion to the time.
* **Watch time** of a visit is ``[begin, begin + time watched)``, split by the segments on air. A visit without a
  beginning in the log began its time watched before its exit; one without an exit has no watch time.
* An **exposure** belongs to the segment on air at the beginning of the visit.

The rate of ``click`` is per exposure, that of other behaviours per hour watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.console.progress import Progress
from trainer.data.format.schema import DOMAINS
from trainer.data.format.validation import Columns
from trainer.semantic_ids.air_time import BEFORE_FIRST, NO_ROOM, OFF_AIR, AirTime, Overlaps
from trainer.semantic_ids.code_rates import CellSums
from trainer.stream.labels.assembled_rows import EXIT, FIRST_BEHAVIOUR
from trainer.stream.labels.event_log import EventLog

HOUR_MS = 3_600_000
PER_EXPOSURE = ("click",)
"""Behaviours whose rate is per exposure."""

WITHOUT_CODE = -4
UNATTRIBUTED: dict[int, str] = {
    NO_ROOM: "in a room without segments",
    BEFORE_FIRST: "before the first segment of the room",
    OFF_AIR: "after the end of a segment",
    WITHOUT_CODE: "in a segment without a code",
}
"""Reasons why an event belongs to no code."""

_LIVE = DOMAINS.index("live")
_NO_TIME = np.iinfo(np.int64).max


class Visits(NamedTuple):
    """Visits to rooms of one partition, ``[v]`` each, in order of user and visit.

    Attributes:
        user_id, item_id: int64.
        begin_ms: int64, time of the exposure, or of the exit minus the time watched; of no use without both.
        exit_ms: int64, -1 without an exit.
        play_ms: int64, time watched; 0 without an exit.
        exposed: bool, the log has the beginning.
    """

    user_id: np.ndarray
    item_id: np.ndarray
    begin_ms: np.ndarray
    exit_ms: np.ndarray
    play_ms: np.ndarray
    exposed: np.ndarray

    @property
    def end_ms(self) -> np.ndarray:
        """Time at which the time watched has passed, ``[v]`` int64."""
        return self.begin_ms + self.play_ms


class VisitEvents(NamedTuple):
    """Behaviours of visits to rooms, ``[e]`` each.

    Attributes:
        visit: int64, place of the visit.
        behaviour: int64, position in the behaviours of the dataset.
        time_ms: int64.
        at_exit: bool, the event is at the very end of its visit, in which something was watched.
    """

    visit: np.ndarray
    behaviour: np.ndarray
    time_ms: np.ndarray
    at_exit: np.ndarray


def visits_of(events: Columns) -> tuple[Visits, VisitEvents]:
    """Return the visits to rooms, and their behaviours, of a partition of an event log."""
    live = np.flatnonzero(events["domain"] == _LIVE)
    order = live[np.lexsort((events["visit_id"][live], events["user_id"][live]))]
    user, visit, code = (events[name][order] for name in ("user_id", "visit_id", "event"))
    time_ms = events["time_ms"][order]
    first = np.flatnonzero(np.diff(user, prepend=-1) | np.diff(visit, prepend=-1))
    number = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(order))))
    ends, opens = code == EXIT, code < EXIT
    # reduceat has no answer for no visits.
    some = len(first) > 0
    begin_ms = np.minimum.reduceat(np.where(opens, time_ms, _NO_TIME), first) if some else np.empty(0, np.int64)
    exit_ms = np.maximum.reduceat(np.where(ends, time_ms, -1), first) if some else np.empty(0, np.int64)
    watched = np.where(ends, events["value"][order], 0)
    play_ms = np.maximum.reduceat(watched, first) if some else np.empty(0)
    exposed = begin_ms < _NO_TIME
    play_ms = np.maximum(np.rint(play_ms.astype(np.float64)), 0).astype(np.int64)
    begin_ms = np.where(exposed, begin_ms, exit_ms - play_ms)
    visits = Visits(user[first], events["item_id"][order][first], begin_ms, exit_ms, play_ms, exposed)
    at = np.flatnonzero(code >= FIRST_BEHAVIOUR)
    of = number[at]
    at_exit = (time_ms[at] == exit_ms[of]) & (play_ms[of] > 0)
    return visits, VisitEvents(of, code[at].astype(np.int64) - FIRST_BEHAVIOUR, time_ms[at], at_exit)


@dataclass
class SegmentActivity:
    """Sums over the event log of a dataset.

    Attributes:
        behaviours: names.
        watch_ms: ``[n]`` float64, time watched in each segment.
        exposures: ``[n]`` float64, visits that began in each segment.
        events: ``[n, behaviours]`` float64.
        spread: ``[behaviours]`` int64, events that were spread over their visit.
        unattributed: reason -> ``[behaviours]`` int64, events that belong to no code.
        visits: number of visits to rooms.
        without_exit: of these, those without an exit.
        users: sums over cells of user and code.
    """

    behaviours: tuple[str, ...]
    watch_ms: np.ndarray
    exposures: np.ndarray
    events: np.ndarray
    spread: np.ndarray
    unattributed: dict[int, np.ndarray]
    visits: int
    without_exit: int
    users: CellSums

    def base(self, behaviour: int) -> np.ndarray:
        """Return the base of the rate of a behaviour in each segment: exposures, or hours watched; ``[n]`` float64."""
        return self.exposures if self.behaviours[behaviour] in PER_EXPOSURE else self.watch_ms / HOUR_MS


def read_activity(log: EventLog, air: AirTime, code: np.ndarray, codes: int, *, quiet: bool = False) -> SegmentActivity:
    """Read the event log of a dataset, and attribute everything to segments.

    Args:
        log: the event log.
        air: times of the dataset's segments.
        code: ``[n]`` int64, code of each segment, -1 for none.
        codes: number of codes.
        quiet: show no progress.

    Raises:
        UserError: a part of the log cannot be read.
    """
    n, behaviours = len(code), log.spec.behaviours
    count = len(behaviours)
    activity = SegmentActivity(
        behaviours,
        np.zeros(n),
        np.zeros(n),
        np.zeros((n, count)),
        np.zeros(count, np.int64),
        {reason: np.zeros(count, np.int64) for reason in UNATTRIBUTED},
        0,
        0,
        CellSums.zeros(codes, count),
    )
    partitions = log.spec.partitions
    with Progress("reading events", partitions, "partitions", quiet=quiet) as progress:
        for partition in range(partitions):
            add_visits(activity, *visits_of(log.read(partition)), air, code)
            progress.advance(1)
    return activity


def add_visits(activity: SegmentActivity, visits: Visits, events: VisitEvents, air: AirTime, code: np.ndarray) -> None:
    """Add the visits and events of users of whom nothing else is added; the arguments are as above."""
    n, behaviours = len(code), len(activity.behaviours)
    activity.visits += len(visits.user_id)
    activity.without_exit += int((visits.exit_ms < 0).sum())
    watched = air.overlaps(visits.item_id, visits.begin_ms, visits.end_ms)
    activity.watch_ms += np.bincount(watched.place, watched.ms, minlength=n)
    exposed = np.flatnonzero(visits.exposed)
    began = air.at(visits.item_id[exposed], visits.begin_ms[exposed])
    exposed, began = exposed[began >= 0], began[began >= 0]
    activity.exposures += np.bincount(began, minlength=n)
    # (user, code) of watch time and of exposures, and of the events below.
    users = np.unique(visits.user_id, return_inverse=True)[1]
    cells = _Cells(users, code, activity.users)
    cells.add_base(watched.visit, watched.place, watched.ms / HOUR_MS, exposures=False)
    cells.add_base(exposed, began, np.ones(len(began)), exposures=True)
    total_ms = np.bincount(watched.visit, watched.ms, minlength=len(users))
    for behaviour in range(behaviours):
        own = np.flatnonzero(events.behaviour == behaviour)
        visit = events.visit[own]
        spread = events.at_exit[own] & (total_ms[visit] > 0)
        activity.spread[behaviour] += int(spread.sum())
        at = air.at(visits.item_id[visit[~spread]], events.time_ms[own[~spread]])
        shares = _spread(np.bincount(visit[spread], minlength=len(users)), watched, total_ms)
        of = np.concatenate([visit[~spread], watched.visit[shares > 0]])
        place = np.concatenate([at, watched.place[shares > 0]])
        amount = np.concatenate([np.ones(len(at)), shares[shares > 0]])
        for reason in (NO_ROOM, BEFORE_FIRST, OFF_AIR):
            activity.unattributed[reason][behaviour] += int((at == reason).sum())
        of, place, amount = of[place >= 0], place[place >= 0], amount[place >= 0]
        activity.events[:, behaviour] += np.bincount(place, amount, minlength=n)
        # Spread events may be in part in segments without a code.
        missing = amount[code[place] < 0].sum()
        activity.unattributed[WITHOUT_CODE][behaviour] += round(float(missing))
        cells.add_events(behaviour, activity.behaviours[behaviour] in PER_EXPOSURE, of, place, amount)


def _spread(counts: np.ndarray, watched: Overlaps, total_ms: np.ndarray) -> np.ndarray:
    """Return the part of the spread events of each visit, ``counts [v]``, that each of its overlaps gets."""
    if not counts.any():
        return np.zeros(len(watched.ms))
    return counts[watched.visit] * watched.ms / np.maximum(total_ms, 1)[watched.visit]


class _Cells:
    """Cells of user and code of one partition.

    Args:
        users: ``[v]``, number of the user of each visit.
        code: ``[n]``, code of each segment.
        sums: sums to which the cells are added.
    """

    def __init__(self, users: np.ndarray, code: np.ndarray, sums: CellSums) -> None:
        self._users, self._code, self._sums = users, code, sums
        self._codes = len(sums.base)
        # Base by its kind: cells in ascending order, and their sums.
        self._base: dict[bool, tuple[np.ndarray, np.ndarray]] = {}

    def add_base(self, visit: np.ndarray, place: np.ndarray, amount: np.ndarray, *, exposures: bool) -> None:
        """Set the base of one kind: visits, segments and amounts, ``[p]`` each."""
        self._base[exposures] = self._sum(visit, place, amount)

    def add_events(
        self, behaviour: int, exposures: bool, visit: np.ndarray, place: np.ndarray, amount: np.ndarray
    ) -> None:
        """Add the cells of a behaviour; the base has been set."""
        keys, base = self._base[exposures]
        cells, events = self._sum(visit, place, amount)
        # Not the union of both, whose hash table is slow for millions of such keys.
        at = np.minimum(np.searchsorted(keys, cells), max(0, len(keys) - 1))
        own_base = np.where(keys[at] == cells, base[at], 0.0) if len(keys) else np.zeros(len(cells))
        self._sums.add_events(behaviour, cells % self._codes, events, own_base)
        self._sums.add_base(behaviour, keys % self._codes, base)

    def _sum(self, visit: np.ndarray, place: np.ndarray, amount: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cells with a code, ascending, and the sum of the amounts in each."""
        code = self._code[place]
        some = code >= 0
        keys, of = np.unique(self._users[visit[some]] * self._codes + code[some], return_inverse=True)
        return keys, np.bincount(of, amount[some], minlength=len(keys))


def author_sums(activity: SegmentActivity, code: np.ndarray, author: np.ndarray, codes: int) -> CellSums:
    """Return the sums over cells of author and code.

    Args:
        activity: of the segments.
        code: ``[n]`` int64, code of each segment, -1 for none.
        author: ``[n]`` int64, a number for each author, from 0 on.
        codes: number of codes.
    """
    some = np.flatnonzero(code >= 0)
    keys, of = np.unique(author[some] * codes + code[some], return_inverse=True)
    sums = CellSums.zeros(codes, len(activity.behaviours))
    for behaviour in range(len(activity.behaviours)):
        columns = (activity.events[some, behaviour], activity.base(behaviour)[some])
        sums.add(behaviour, keys % codes, *(np.bincount(of, column, minlength=len(keys)) for column in columns))
    return sums


def unattributed_counts(activity: SegmentActivity) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield each reason with the numbers of events by behaviour."""
    for reason, counts in activity.unattributed.items():
        yield UNATTRIBUTED[reason], dict(zip(activity.behaviours, counts.tolist(), strict=True))
