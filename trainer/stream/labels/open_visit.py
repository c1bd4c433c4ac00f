"""What each policy makes of one open visit: the state machines of the incremental assembler.

Behaviours are bits of an int, behaviour k being ``1 << k``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from trainer.stream.labels.assembled_rows import END_OF_TIME, EXIT_ROW, FAST, FULL, REPORT, SLOW
from trainer.stream.labels.policy import FastSlow, Full, Policy, Realtime


class OpenVisit:
    """A visit that may still give a row.

    Attributes:
        user_id, visit_id, author_id, item_id, domain: of its first event.
        request_ms: its beginning.
        last_ms: its latest event.
        exit_ms: its end, once it is known: an exit came, or it was idle for too long; else ``END_OF_TIME``.
        applies: bits of the behaviours that can happen in its domain.
        seen: bits of those that happened, under ``realtime_naive`` since the last tick.
        reported: bits of those that some row has told of.
        report_ms: when its next row is due that is not that of its end, ``END_OF_TIME`` for never.
        due_ms: when it is to be looked at again; earlier marks in the queue have lost their meaning.
        ended: its end has passed, and only ``report_ms`` keeps it.
    """

    __slots__ = (
        "applies", "author_id", "domain", "due_ms", "ended", "exit_ms", "item_id", "last_ms", "report_ms", "reported",
        "request_ms", "seen", "user_id", "visit_id",
    )  # fmt: skip

    def __init__(
        self, user_id: int, visit_id: int, author_id: int, item_id: int, domain: int, request_ms: int, applies: int
    ) -> None:
        self.user_id, self.visit_id, self.author_id, self.item_id = user_id, visit_id, author_id, item_id
        self.domain, self.request_ms, self.applies = domain, request_ms, applies
        self.last_ms = request_ms
        self.exit_ms = self.report_ms = self.due_ms = END_OF_TIME
        self.seen = self.reported = 0
        self.ended = False


class Report(NamedTuple):
    """A row of a visit: its kind, and bits of its labels and of what is unmasked."""

    kind: int
    label: int
    mask: int


class Reporter(ABC):
    """A policy's rules for one visit at a time. Behaviours are given in time order; ``END_OF_TIME`` is never."""

    def first_report_ms(self, visit: OpenVisit) -> int:
        """``report_ms`` of a visit that begins."""
        return END_OF_TIME

    def happened(self, visit: OpenVisit, behaviour: int, time_ms: int) -> None:
        """A behaviour that applies (its bit) happened; may bring ``report_ms`` forward."""
        visit.seen |= behaviour

    def due(self, visit: OpenVisit) -> Report | None:
        """The row of ``report_ms``, which is moved on."""
        raise AssertionError("a policy without rows before the end was asked for one")

    @abstractmethod
    def end(self, visit: OpenVisit) -> Report | None:
        """The row of the end of the visit."""


class _FullReporter(Reporter):
    def end(self, visit: OpenVisit) -> Report | None:
        return Report(FULL, visit.seen, visit.applies)


class _FastSlowReporter(Reporter):
    def __init__(self, policy: FastSlow) -> None:
        self._fast_ms, self._slow_ms = policy.fast_ms, policy.slow_ms

    def first_report_ms(self, visit: OpenVisit) -> int:
        return visit.request_ms + self._fast_ms

    def due(self, visit: OpenVisit) -> Report | None:
        if visit.report_ms == visit.request_ms + self._fast_ms:
            visit.reported = visit.seen
            # Of a visit that has ended nothing more can be seen.
            visit.report_ms = END_OF_TIME if visit.ended else visit.request_ms + self._slow_ms
            return Report(FAST, visit.seen, visit.applies)
        missed = visit.seen & ~visit.reported
        visit.report_ms = END_OF_TIME
        return Report(SLOW, missed, missed)

    def end(self, visit: OpenVisit) -> Report | None:
        fast_is_out = visit.report_ms != visit.request_ms + self._fast_ms
        if fast_is_out and visit.seen == visit.reported:
            visit.report_ms = END_OF_TIME
        return None


class _RealtimeReporter(Reporter):
    def __init__(self, policy: Realtime) -> None:
        self._tick_ms = policy.tick_ms

    def happened(self, visit: OpenVisit, behaviour: int, time_ms: int) -> None:
        if not visit.seen & behaviour:
            visit.seen |= behaviour
            ticks = -(-(time_ms - visit.request_ms) // self._tick_ms) or 1
            visit.report_ms = visit.request_ms + ticks * self._tick_ms

    def due(self, visit: OpenVisit) -> Report | None:
        fresh = visit.seen & ~visit.reported
        visit.reported = visit.seen
        visit.report_ms = END_OF_TIME
        return Report(REPORT, fresh, fresh)

    def end(self, visit: OpenVisit) -> Report | None:
        visit.report_ms = END_OF_TIME
        rest = visit.applies & ~visit.reported
        return Report(EXIT_ROW, visit.seen & rest, rest)


class _NaiveReporter(Reporter):
    def __init__(self, tick_ms: int) -> None:
        self._tick_ms = tick_ms

    def first_report_ms(self, visit: OpenVisit) -> int:
        return visit.request_ms + self._tick_ms

    def due(self, visit: OpenVisit) -> Report | None:
        label, visit.seen = visit.seen, 0
        visit.report_ms += self._tick_ms
        return Report(REPORT, label, visit.applies)

    def end(self, visit: OpenVisit) -> Report | None:
        visit.report_ms = END_OF_TIME
        return Report(EXIT_ROW, visit.seen, visit.applies)


def reporter_of(policy: Policy) -> Reporter:
    """The rules of a policy."""
    if isinstance(policy, Full):
        return _FullReporter()
    if isinstance(policy, FastSlow):
        return _FastSlowReporter(policy)
    if isinstance(policy, Realtime):
        return _RealtimeReporter(policy)
    return _NaiveReporter(policy.tick_ms)
