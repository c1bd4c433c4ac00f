"""Streaming assembler: turns the events of a live stream into rows, with the open visits as keyed state.

Events are buffered until the watermark has passed them, and are then applied in time order. So the rows do not depend
on the order or the portions in which events arrive, as long as they are not late. Every visit has a timer in a queue:
its next report, its exit, or its idle timeout, whichever comes first.
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
    END_OF_TIME,
    ENTER,
    EVENT_TYPES,
    EXIT,
    FIRST_BEHAVIOUR,
    LATE,
    NO_OPEN_VISIT,
    ROW_COLUMNS,
    STARTED_COLUMNS,
    AssembledRows,
    concatenate,
    no_events,
    select_unused,
)
from trainer.stream.labels.open_visit import OpenVisit, Report, reporter_of
from trainer.stream.labels.policy import POLICIES, EventTimeouts, Policy
from trainer.stream.labels.visit_grouping import in_domains, is_late, simultaneous_rank

State = dict[str, np.ndarray]
"""State of an assembler: plain arrays of integers and floats, no Python objects."""

COUNTS: tuple[str, ...] = ("events", "late", "no_open_visit", "visits", "timed_out")
"""Counters over the domains that become rows: events that arrived, unused events by reason, visits that started, and
visits that ended by the idle timeout."""

_Timer = tuple[int, int, int, int, int, OpenVisit]
"""Timer in the queue: ``due_ms, user_id, visit_id, request_ms`` (the order of rows), a serial number, the visit."""


class StreamAssembler:
    """Turns the events of one partition into rows as they arrive.

    Memory is bounded by the open visits, the rows of ended visits that are not yet due, and the events of the last
    ``max_out_of_orderness_ms``.

    Args:
        spec: description of the dataset, or of the data in the stream.
        policy: report policy.
        timeouts: limits for late events and for idle visits.
        domains: domains whose visits become rows, ``spec.candidates`` by default; other events only move the watermark.
    """

    def __init__(
        self, spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, domains: Sequence[str] | None = None
    ) -> None:
        self._spec, self._policy, self._timeouts, self._domains = spec, policy, timeouts, domains
        self._reporter = reporter_of(policy)
        mask_by_domain = masks(spec, np.arange(len(DOMAINS)))
        self._applies = [_bits(mask) for mask in mask_by_domain]
        self._settings = np.array(
            [list(POLICIES).index(policy.name), *asdict(policy).values(), *asdict(timeouts).values()], np.int64
        )
        self.watermark_ms = -END_OF_TIME
        self.counts = dict.fromkeys(COUNTS, 0)
        # Heap of buffered portions, each in time order: first time, serial number, columns.
        self._buffered: list[tuple[int, int, Columns]] = []
        self._open: dict[tuple[int, int], OpenVisit] = {}
        self._queue: list[_Timer] = []
        self._open_count = 0
        self._serial = 0
        self._rows: list[tuple[int, ...]] = []
        self._started: list[tuple[int, ...]] = []

    @property
    def open_visits(self) -> int:
        """Number of visits that have not ended, or whose last row is not due yet."""
        return self._open_count

    @property
    def waiting_events(self) -> int:
        """Number of buffered events, which the watermark has not passed."""
        return sum(len(part["time_ms"]) for _, _, part in self._buffered)

    def unfinished(self) -> Iterator[tuple[int, int]]:
        """Yield ``user_id, visit_id`` of the visits that can still give a row: open, due, or with buffered events."""
        yield from {(timer[-1].user_id, timer[-1].visit_id) for timer in self._queue if timer[-1].due_ms == timer[0]}
        for _, _, part in self._buffered:
            yield from zip(part["user_id"].tolist(), part["visit_id"].tolist(), strict=True)

    def push(self, events: Columns) -> AssembledRows:
        """Add events in order of arrival; return the rows that have become final and the visits that have started.

        A row is final once the watermark is later than its ``emit_ms``. The rows of all calls together are in order,
        and they do not depend on how the stream is cut into portions.

        Args:
            events: columns of ``EVENT_TYPES``.
        """
        watermark = self.watermark_ms
        if len(events["time_ms"]):
            # Events of all domains move the watermark, also those that make no rows.
            self.watermark_ms = max(watermark, int(events["time_ms"].max()) - self._timeouts.max_out_of_orderness_ms)
        # Each event is compared with the watermark at its own arrival, so cuts between portions change nothing.
        late = is_late(events["time_ms"], self._timeouts.max_out_of_orderness_ms, watermark)
        counted = in_domains(self._spec, events["domain"], self._domains)
        unused = [select_unused(events, np.flatnonzero(late & counted), LATE)]
        self._buffer(events, np.flatnonzero(counted & ~late))
        self.counts["events"] += int(counted.sum())
        return self._release(unused)

    def advance(self, until_ms: int = END_OF_TIME) -> AssembledRows:
        """Advance the watermark to ``until_ms``; return the rows that become final.

        Call it for a silent partition, and without ``until_ms`` at the end of a stream: visits that are still open then
        end by the idle timeout.
        """
        self.watermark_ms = max(self.watermark_ms, until_ms)
        return self._release([select_unused(no_events(), np.empty(0, np.int64), LATE)])

    def state_dict(self) -> State:
        """Return the complete state between two calls, for ``load_state_dict``."""
        # Every unfinished visit has exactly one valid timer, so the queue holds all of them.
        visits = {id(timer[-1]): timer[-1] for timer in self._queue if timer[-1].due_ms == timer[0]}
        # In order of arrival, which decides the order of simultaneous events after a restore.
        buffered = [part for _, _, part in sorted(self._buffered, key=lambda entry: entry[1])]
        return {
            "settings": self._settings.copy(),
            "watermark_ms": np.array([self.watermark_ms], np.int64),
            "counts": np.array([self.counts[name] for name in COUNTS], np.int64),
            **{
                f"visit.{name}": np.array([getattr(visit, name) for visit in visits.values()], np.int64)
                for name in OpenVisit.__slots__
            },
            **{f"event.{name}": column.copy() for name, column in concatenate([no_events(), *buffered]).items()},
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the state of this assembler by a saved one.

        Raises:
            UserError: the state was saved under another policy or other timeouts.
        """
        if not np.array_equal(state["settings"], self._settings):
            raise UserError(
                f"the open visits of the checkpoint were assembled under {_described(state['settings'])}; "
                f"the job asks for {_described(self._settings)}"
            )
        self.watermark_ms = int(state["watermark_ms"][0])
        self.counts = dict(zip(COUNTS, state["counts"].tolist(), strict=True))
        self._open, self._queue, self._buffered, self._open_count = {}, [], [], 0
        columns = [state[f"visit.{name}"].tolist() for name in OpenVisit.__slots__]
        for values in zip(*columns, strict=True):
            # All slots are restored; the constructor sets only some of them.
            visit = OpenVisit.__new__(OpenVisit)
            for name, value in zip(OpenVisit.__slots__, values, strict=True):
                setattr(visit, name, value)
            if not visit.ended:
                self._open[visit.user_id, visit.visit_id] = visit
            self._open_count += 1
            self._set_timer(visit, visit.due_ms)
        events = {name: np.asarray(state[f"event.{name}"], dtype) for name, dtype in EVENT_TYPES.items()}
        self._buffer(events, np.arange(len(events["time_ms"])))

    def _buffer(self, events: Columns, at: np.ndarray) -> None:
        """Buffer the events at positions ``at`` until the watermark has passed them."""
        if not len(at):
            return
        time_ms = events["time_ms"][at]
        order = at[stable_order(time_ms * 4 + simultaneous_rank(events["event"][at]))]
        part = {name: events[name][order].astype(dtype, copy=False) for name, dtype in EVENT_TYPES.items()}
        self._serial += 1
        heapq.heappush(self._buffered, (int(part["time_ms"][0]), self._serial, part))

    def _release(self, unused: list[Columns]) -> AssembledRows:
        """Apply the buffered events before the watermark, and fire the timers before it."""
        ready: list[tuple[int, Columns]] = []
        while self._buffered and self._buffered[0][0] < self.watermark_ms:
            _, serial, part = heapq.heappop(self._buffered)
            stop = int(np.searchsorted(part["time_ms"], self.watermark_ms))
            ready.append((serial, {name: column[:stop] for name, column in part.items()}))
            if stop < len(part["time_ms"]):
                # The rest keeps its serial number, because its order of arrival has not changed.
                rest = {name: column[stop:] for name, column in part.items()}
                heapq.heappush(self._buffered, (int(rest["time_ms"][0]), serial, rest))
        if ready:
            # Simultaneous events of a kind keep their order of arrival, so a portion's serial number decides.
            events = concatenate([part for _, part in sorted(ready, key=lambda entry: entry[0])])
            order = stable_order(events["time_ms"] * 4 + simultaneous_rank(events["event"]))
            events = {name: column[order] for name, column in events.items()}
            unused.append(select_unused(events, self._apply(events), NO_OPEN_VISIT))
        self._fire_timers_before(self.watermark_ms)
        if len(self._queue) > 3 * self._open_count + 64:
            # Stale timers would keep finished visits in memory.
            newest = {id(timer[-1]): timer for timer in self._queue if timer[-1].due_ms == timer[0]}
            self._queue = list(newest.values())
            heapq.heapify(self._queue)
        all_unused = concatenate(unused)
        self.counts["late"] += int((all_unused["reason"] == LATE).sum())
        self.counts["no_open_visit"] += int((all_unused["reason"] == NO_OPEN_VISIT).sum())
        return AssembledRows(self._take_rows(), self._take_started(), all_unused)

    def _apply(self, events: Columns) -> np.ndarray:
        """Apply events in time order; return the positions of events without an open visit."""
        without_visit = []
        queue, open_visits, happened = self._queue, self._open, self._reporter.happened
        columns = (events[name].tolist() for name in ("time_ms", "event", "user_id", "visit_id"))
        for place, (time_ms, code, user_id, visit_id) in enumerate(zip(*columns, strict=True)):
            # Timers due at this same time must wait, because simultaneous events still count.
            if queue and queue[0][0] < time_ms:
                self._fire_timers_before(time_ms)
            visit = open_visits.get((user_id, visit_id))
            if visit is None:
                if code <= ENTER:
                    self._start_visit(events, place)
                else:
                    without_visit.append(place)
                continue
            visit.last_ms = time_ms
            if code == EXIT:
                # The first exit counts.
                if visit.exit_ms == END_OF_TIME:
                    visit.exit_ms = time_ms
                    self._set_timer(visit, time_ms)
            elif code >= FIRST_BEHAVIOUR:
                behaviour = 1 << (code - FIRST_BEHAVIOUR)
                if visit.applies & behaviour:
                    happened(visit, behaviour, time_ms)
                    if visit.report_ms < visit.due_ms:
                        self._set_timer(visit, visit.report_ms)
        return np.array(without_visit, np.int64)

    def _start_visit(self, events: Columns, place: int) -> None:
        """Open the visit of the event at ``place``."""
        names = ("user_id", "visit_id", "author_id", "item_id", "domain", "time_ms")
        user_id, visit_id, author_id, item_id, domain, time_ms = (int(events[name][place]) for name in names)
        visit = OpenVisit(user_id, visit_id, author_id, item_id, domain, time_ms, self._applies[domain])
        visit.report_ms = self._reporter.first_report_ms(visit)
        self._open[user_id, visit_id] = visit
        self._open_count += 1
        self._started.append((visit_id, user_id, author_id, item_id, domain, time_ms))
        self.counts["visits"] += 1
        self._set_timer(visit, min(visit.report_ms, time_ms + self._timeouts.idle_ms))

    def _set_timer(self, visit: OpenVisit, due_ms: int) -> None:
        """Set the timer of a visit; its earlier timers in the queue become stale."""
        visit.due_ms = due_ms
        self._serial += 1
        timer = (due_ms, visit.user_id, visit.visit_id, visit.request_ms, self._serial, visit)
        heapq.heappush(self._queue, timer)

    def _fire_timers_before(self, until_ms: int) -> None:
        """Fire all timers before ``until_ms``, in the order of the rows."""
        queue = self._queue
        while queue and queue[0][0] < until_ms:
            due_ms, *_, visit = heapq.heappop(queue)
            # Other timers of the visit are stale.
            if visit.due_ms == due_ms:
                self._on_timer(visit, due_ms)

    def _on_timer(self, visit: OpenVisit, now_ms: int) -> None:
        """Handle the timer of a visit: end it, emit its due rows, and set the next timer."""
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
        # Nothing more can come of the visit; dropping its timer frees it.
        if next_ms == END_OF_TIME:
            visit.due_ms = END_OF_TIME
            self._open_count -= 1
        else:
            self._set_timer(visit, next_ms)

    def _emit(self, visit: OpenVisit, emit_ms: int, report: Report | None) -> None:
        """Add a row unless nothing is unmasked in it."""
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

    def _take_started(self) -> Rows:
        """Return the visits that have started since the last call, as columns."""
        columns = _columns(STARTED_COLUMNS, self._started)
        self._started = []
        # Visits of one millisecond are in order of arrival. No earlier visit can follow, so sorting here is enough.
        order = np.lexsort((columns["visit_id"], columns["user_id"], columns["request_ms"]))
        started = {name: column[order] for name, column in columns.items()}
        return started | {"domain": started["domain"].astype(np.uint8)}

    def _take_rows(self) -> Rows:
        """Return the rows since the last call, as columns."""
        # Labels and masks are still bits here.
        rows = _columns(ROW_COLUMNS, self._rows)
        self._rows = []
        rows |= {name: rows[name].astype(np.uint8) for name in ("domain", "kind")}
        return rows | {name: labels(self._spec, rows[name].astype(np.int32)) for name in ("label", "mask")}


def _columns(names: Sequence[str], lines: Sequence[tuple[int, ...]]) -> Columns:
    """Return tuples as int64 columns."""
    table = np.array(lines, np.int64).reshape(-1, len(names))
    return dict(zip(names, np.ascontiguousarray(table.T), strict=True))


def _bits(mask: np.ndarray) -> int:
    """Return a mask of behaviours as bits."""
    return sum(1 << k for k, unmasked in enumerate(mask.tolist()) if unmasked)


def _described(settings: np.ndarray) -> str:
    """Return saved settings as text for a message."""
    policy, *milliseconds = settings.tolist()
    return f"{list(POLICIES)[policy]} {milliseconds}"
