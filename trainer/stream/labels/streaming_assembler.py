"""The incremental assembler: rows of a live stream, with the open visits as keyed state.

Events wait until the watermark has passed them, and are then taken in time order: the order in which they arrived, and
in what portions, changes nothing. Every visit stands in a queue of times at which it is to be looked at again: its next
report, its exit, or the moment at which it has been idle for too long.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows
from trainer.data.format.sorting import stable_order
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import labels, masks
from trainer.stream.labels.assembled_rows import (
    BEGUN_COLUMNS,
    END_OF_TIME,
    ENTER,
    EVENT_TYPES,
    EXIT,
    FIRST_BEHAVIOUR,
    LATE,
    NO_OPEN_VISIT,
    ROW_COLUMNS,
    Assembled,
    concatenate,
    no_events,
    take_aside,
)
from trainer.stream.labels.open_visit import OpenVisit, Report, reporter_of
from trainer.stream.labels.policy import POLICIES, EventTimeouts, Policy
from trainer.stream.labels.visit_grouping import is_late, of_domains, simultaneous_rank

State = dict[str, np.ndarray]
"""State of an assembler: plain arrays of integers and floats, none of them objects."""

COUNTS: tuple[str, ...] = ("events", "late", "no_open_visit", "visits", "timed_out")
"""What is counted of the domains that become rows: events that arrived, those set aside by reason, visits that began,
and those that ended without an exit."""

_Mark = tuple[int, int, int, int, int, OpenVisit]
"""A time in the queue, what orders visits of the same time, a running number, and the visit."""


class StreamAssembler:
    """Turns the events of one partition into rows as they arrive.

    Memory is bounded by the open visits, the rows of ended visits that are not yet due, and the events of the last
    ``max_out_of_orderness_ms``.

    Args:
        spec: of the dataset, or of what the stream carries.
        policy: which rows.
        timeouts: what is late, and when a visit without an exit has ended.
        domains: those whose visits become rows, ``spec.candidates`` by default; events of others move the watermark.
    """

    def __init__(
        self, spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, domains: Sequence[str] | None = None
    ) -> None:
        self._spec, self._policy, self._timeouts, self._domains = spec, policy, timeouts, domains
        self._reporter = reporter_of(policy)
        of_domain = masks(spec, np.arange(len(DOMAINS)))
        self._applies = [_bits(mask) for mask in of_domain]
        self._settings = np.array(
            [list(POLICIES).index(policy.name), *asdict(policy).values(), *asdict(timeouts).values()], np.int64
        )
        self.watermark_ms = -END_OF_TIME
        self.counts = dict.fromkeys(COUNTS, 0)
        # Portions of events that wait, each in time order: the first time in it, its number, its columns.
        self._waiting: list[tuple[int, int, Columns]] = []
        self._open: dict[tuple[int, int], OpenVisit] = {}
        self._queue: list[_Mark] = []
        self._live = 0
        self._serial = 0
        self._rows: list[tuple[int, ...]] = []
        self._begun: list[tuple[int, ...]] = []

    @property
    def open_visits(self) -> int:
        """Visits that have not ended, or whose last row is not due yet."""
        return self._live

    @property
    def waiting_events(self) -> int:
        """Events that the watermark has not passed."""
        return sum(len(part["time_ms"]) for _, _, part in self._waiting)

    def unfinished(self) -> Iterator[tuple[int, int]]:
        """``user_id, visit_id`` of the visits that can still give a row: open, due, or waiting to begin."""
        yield from {(mark[-1].user_id, mark[-1].visit_id) for mark in self._queue if mark[-1].due_ms == mark[0]}
        for _, _, part in self._waiting:
            yield from zip(part["user_id"].tolist(), part["visit_id"].tolist(), strict=True)

    def push(self, events: Columns) -> Assembled:
        """Take events in the order in which they arrive; gives the rows that have become final, and visits that began.

        A row is final once the watermark is later than its ``emit_ms``. All rows that are ever given are in order, and
        they are the same however the stream is cut into portions.

        Args:
            events: columns of ``rows.EVENT_TYPES``.
        """
        watermark = self.watermark_ms
        if len(events["time_ms"]):
            self.watermark_ms = max(watermark, int(events["time_ms"].max()) - self._timeouts.max_out_of_orderness_ms)
        late = is_late(events["time_ms"], self._timeouts.max_out_of_orderness_ms, watermark)
        counted = of_domains(self._spec, events["domain"], self._domains)
        aside = [take_aside(events, np.flatnonzero(late & counted), LATE)]
        self._wait(events, np.flatnonzero(counted & ~late))
        self.counts["events"] += int(counted.sum())
        return self._release(aside)

    def advance(self, until_ms: int = END_OF_TIME) -> Assembled:
        """Take it that no event before ``until_ms`` will come any more; gives the rows that this makes final.

        For a partition that has fallen silent, and, without ``until_ms``, for the end of a stream: visits that are
        still open then end when they have been idle for long enough.
        """
        self.watermark_ms = max(self.watermark_ms, until_ms)
        return self._release([take_aside(no_events(), np.empty(0, np.int64), LATE)])

    def state_dict(self) -> State:
        """All that the rows to come depend on, between two calls; to be given to ``load_state_dict``."""
        visits = {id(mark[-1]): mark[-1] for mark in self._queue if mark[-1].due_ms == mark[0]}
        waiting = [part for _, _, part in sorted(self._waiting, key=lambda entry: entry[1])]
        return {
            "settings": self._settings.copy(),
            "watermark_ms": np.array([self.watermark_ms], np.int64),
            "counts": np.array([self.counts[name] for name in COUNTS], np.int64),
            **{
                f"visit.{name}": np.array([getattr(visit, name) for visit in visits.values()], np.int64)
                for name in OpenVisit.__slots__
            },
            **{f"event.{name}": column.copy() for name, column in concatenate([no_events(), *waiting]).items()},
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from where ``state_dict`` was called, in place of all that this assembler has seen.

        Raises:
            UserError: the state was made under another policy or timeouts.
        """
        if not np.array_equal(state["settings"], self._settings):
            raise UserError(
                f"the open visits of the checkpoint were assembled under {_described(state['settings'])}; "
                f"the job asks for {_described(self._settings)}"
            )
        self.watermark_ms = int(state["watermark_ms"][0])
        self.counts = dict(zip(COUNTS, state["counts"].tolist(), strict=True))
        self._open, self._queue, self._waiting, self._live = {}, [], [], 0
        columns = [state[f"visit.{name}"].tolist() for name in OpenVisit.__slots__]
        for values in zip(*columns, strict=True):
            visit = OpenVisit.__new__(OpenVisit)
            for name, value in zip(OpenVisit.__slots__, values, strict=True):
                setattr(visit, name, value)
            if not visit.ended:
                self._open[visit.user_id, visit.visit_id] = visit
            self._live += 1
            self._mark(visit, visit.due_ms)
        events = {name: np.asarray(state[f"event.{name}"], dtype) for name, dtype in EVENT_TYPES.items()}
        self._wait(events, np.arange(len(events["time_ms"])))

    def _wait(self, events: Columns, at: np.ndarray) -> None:
        """Let the events at positions ``at`` wait for the watermark."""
        if not len(at):
            return
        time_ms = events["time_ms"][at]
        order = at[stable_order(time_ms * 4 + simultaneous_rank(events["event"][at]))]
        part = {name: events[name][order].astype(dtype, copy=False) for name, dtype in EVENT_TYPES.items()}
        self._serial += 1
        heapq.heappush(self._waiting, (int(part["time_ms"][0]), self._serial, part))

    def _release(self, aside: list[Columns]) -> Assembled:
        """Take the events that the watermark has passed, and the marks before it."""
        ready: list[tuple[int, Columns]] = []
        while self._waiting and self._waiting[0][0] < self.watermark_ms:
            _, serial, part = heapq.heappop(self._waiting)
            stop = int(np.searchsorted(part["time_ms"], self.watermark_ms))
            ready.append((serial, {name: column[:stop] for name, column in part.items()}))
            if stop < len(part["time_ms"]):
                rest = {name: column[stop:] for name, column in part.items()}
                heapq.heappush(self._waiting, (int(rest["time_ms"][0]), serial, rest))
        if ready:
            # Simultaneous events of a kind stay in the order in which they arrived.
            events = concatenate([part for _, part in sorted(ready, key=lambda entry: entry[0])])
            order = stable_order(events["time_ms"] * 4 + simultaneous_rank(events["event"]))
            events = {name: column[order] for name, column in events.items()}
            aside.append(take_aside(events, self._take(events), NO_OPEN_VISIT))
        self._look_before(self.watermark_ms)
        if len(self._queue) > 3 * self._live + 64:
            # Marks that have lost their meaning would keep visits that are over.
            newest = {id(mark[-1]): mark for mark in self._queue if mark[-1].due_ms == mark[0]}
            self._queue = list(newest.values())
            heapq.heapify(self._queue)
        set_aside = concatenate(aside)
        self.counts["late"] += int((set_aside["reason"] == LATE).sum())
        self.counts["no_open_visit"] += int((set_aside["reason"] == NO_OPEN_VISIT).sum())
        return Assembled(self._take_rows(), self._take_begun(), set_aside)

    def _take(self, events: Columns) -> np.ndarray:
        """Apply events in time order; positions of those that belong to no open visit."""
        orphans = []
        queue, open_visits, happened = self._queue, self._open, self._reporter.happened
        columns = (events[name].tolist() for name in ("time_ms", "event", "user_id", "visit_id"))
        for place, (time_ms, code, user_id, visit_id) in enumerate(zip(*columns, strict=True)):
            # What is due at this very time waits: simultaneous events are part of it.
            if queue and queue[0][0] < time_ms:
                self._look_before(time_ms)
            visit = open_visits.get((user_id, visit_id))
            if visit is None:
                if code <= ENTER:
                    self._begin(events, place)
                else:
                    orphans.append(place)
                continue
            visit.last_ms = time_ms
            if code == EXIT:
                if visit.exit_ms == END_OF_TIME:
                    visit.exit_ms = time_ms
                    self._mark(visit, time_ms)
            elif code >= FIRST_BEHAVIOUR:
                behaviour = 1 << (code - FIRST_BEHAVIOUR)
                if visit.applies & behaviour:
                    happened(visit, behaviour, time_ms)
                    if visit.report_ms < visit.due_ms:
                        self._mark(visit, visit.report_ms)
        return np.array(orphans, np.int64)

    def _begin(self, events: Columns, place: int) -> None:
        names = ("user_id", "visit_id", "author_id", "item_id", "domain", "time_ms")
        user_id, visit_id, author_id, item_id, domain, time_ms = (int(events[name][place]) for name in names)
        visit = OpenVisit(user_id, visit_id, author_id, item_id, domain, time_ms, self._applies[domain])
        visit.report_ms = self._reporter.first_report_ms(visit)
        self._open[user_id, visit_id] = visit
        self._live += 1
        self._begun.append((visit_id, user_id, author_id, item_id, domain, time_ms))
        self.counts["visits"] += 1
        self._mark(visit, min(visit.report_ms, time_ms + self._timeouts.idle_ms))

    def _mark(self, visit: OpenVisit, due_ms: int) -> None:
        """Look at the visit at ``due_ms``, and at no mark of it that is in the queue already."""
        visit.due_ms = due_ms
        self._serial += 1
        mark = (due_ms, visit.user_id, visit.visit_id, visit.request_ms, self._serial, visit)
        heapq.heappush(self._queue, mark)

    def _look_before(self, until_ms: int) -> None:
        """Look at all visits whose time is earlier than ``until_ms``, in the order of the rows."""
        queue = self._queue
        while queue and queue[0][0] < until_ms:
            due_ms, *_, visit = heapq.heappop(queue)
            if visit.due_ms == due_ms:
                self._look(visit, due_ms)

    def _look(self, visit: OpenVisit, now_ms: int) -> None:
        if visit.exit_ms == END_OF_TIME and visit.last_ms + self._timeouts.idle_ms == now_ms:
            visit.exit_ms = now_ms
            self.counts["timed_out"] += 1
        if visit.exit_ms == now_ms:
            visit.ended = True
            del self._open[visit.user_id, visit.visit_id]
            self._emit(visit, now_ms, self._reporter.end(visit))
        if visit.report_ms == now_ms:
            self._emit(visit, now_ms, self._reporter.due(visit))
        next_ms = visit.report_ms
        if not visit.ended:
            next_ms = min(next_ms, visit.last_ms + self._timeouts.idle_ms)
        if next_ms == END_OF_TIME:
            visit.due_ms = END_OF_TIME
            self._live -= 1
        else:
            self._mark(visit, next_ms)

    def _emit(self, visit: OpenVisit, emit_ms: int, report: Report | None) -> None:
        if report is not None and report.mask:
            self._rows.append(
                (
                    visit.visit_id,
                    visit.user_id,
                    visit.author_id,
                    visit.item_id,
                    visit.domain,
                    report.kind,
                    visit.request_ms,
                    emit_ms,
                    report.label,
                    report.mask,
                )
            )

    def _take_begun(self) -> Rows:
        """The visits that have begun since the last call, as columns."""
        columns = _columns(BEGUN_COLUMNS, self._begun)
        self._begun = []
        # Those of one millisecond are in the order in which they arrived; none can begin before them any more.
        order = np.lexsort((columns["visit_id"], columns["user_id"], columns["request_ms"]))
        begun = {name: column[order] for name, column in columns.items()}
        return begun | {"domain": begun["domain"].astype(np.uint8)}

    def _take_rows(self) -> Rows:
        """The rows made since the last call, as columns."""
        # In the order of _emit, label and mask as bits.
        rows = _columns(ROW_COLUMNS, self._rows)
        self._rows = []
        rows |= {name: rows[name].astype(np.uint8) for name in ("domain", "kind")}
        return rows | {name: labels(self._spec, rows[name].astype(np.int32)) for name in ("label", "mask")}


def _columns(names: Sequence[str], lines: Sequence[tuple[int, ...]]) -> Columns:
    table = np.array(lines, np.int64).reshape(-1, len(names))
    return dict(zip(names, np.ascontiguousarray(table.T), strict=True))


def _bits(mask: np.ndarray) -> int:
    return sum(1 << k for k, unmasked in enumerate(mask.tolist()) if unmasked)


def _described(settings: np.ndarray) -> str:
    policy, *milliseconds = settings.tolist()
    return f"{list(POLICIES)[policy]} {milliseconds}"
