"""State machines of the streaming assembler: the rows that each policy reports for one open visit.

A set of behaviours is an int of bits; behaviour k is ``1 << k``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from trainer.stream.labels.assembled_rows import END_OF_TIME, EXIT_ROW, FAST, FULL, REPORT, SLOW
from trainer.stream.labels.policy import FastSlow, Full, Policy, Realtime


class OpenVisit:
    """State of a visit that may still give a row.

    Attributes:
        user_id, visit_id, author_id, item_id, domain: fields of the first event.
        request_ms: time of the first event.
        last_ms: time of the latest event.
        exit_ms: end of the visit once it is known, by an exit or by the idle timeout; ``END_OF_TIME`` before that.
        applies: bits of the behaviours that can happen in the domain.
        seen: bits of the behaviours that happened; under ``realtime_naive`` only since the last tick.
        reported: bits of the behaviours that a row has reported.
        report_ms: due time of the next row before the end row, ``END_OF_TIME`` for none.
        due_ms: time of the visit's valid timer; timers in the queue with another time are stale.
        ended: True if the visit has ended and only ``report_ms`` keeps it.
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
    """Row of a visit: its kind, bits of its positive labels and bits of its unmasked behaviours."""

    kind: int
    label: int
    mask: int


class Reporter(ABC):
    """Rules of a policy for one visit. Behaviours come in time order; ``END_OF_TIME`` means never."""

    def first_report_ms(self, visit: OpenVisit) -> int:
        """Return ``report_ms`` of a visit that starts."""
        return END_OF_TIME

    def happened(self, visit: OpenVisit, behaviour: int, time_ms: int) -> None:
        """Record a behaviour that applies, given by its bit; may set an earlier ``report_ms``."""
        visit.seen |= behaviour

    def due(self, visit: OpenVisit) -> Report | None:
        """Return the row due at ``report_ms``, and set the next ``report_ms``."""
        raise AssertionError("this policy makes no row before the end of a visit")

    @abstractmethod
    def end(self, visit: OpenVisit) -> Report | None:
        """Return the row of the end of the visit, or None."""


class _FullReporter(Reporter):
    """Reports all labels at the end."""

    def end(self, visit: OpenVisit) -> Report | None:
        return Report(FULL, visit.seen, visit.applies)


class _FastSlowReporter(Reporter):
    """Reports all labels after the fast window, and the missed positives after the slow window."""

    def __init__(self, policy: FastSlow) -> None:
        self._fast_ms, self._slow_ms = policy.fast_ms, policy.slow_ms

    def first_report_ms(self, visit: OpenVisit) -> int:
        return visit.request_ms + self._fast_ms

    def due(self, visit: OpenVisit) -> Report | None:
        if visit.report_ms == visit.request_ms + self._fast_ms:
            visit.reported = visit.seen
            # A visit that has ended has no missed positives, so it needs no slow row.
            visit.report_ms = END_OF_TIME if visit.ended else visit.request_ms + self._slow_ms
            return Report(FAST, visit.seen, visit.applies)
        missed = visit.seen & ~visit.reported
        visit.report_ms = END_OF_TIME
        return Report(SLOW, missed, missed)

    def end(self, visit: OpenVisit) -> Report | None:
        fast_row_is_out = visit.report_ms != visit.request_ms + self._fast_ms
        # Without a missed positive the slow row would be empty.
        if fast_row_is_out and visit.seen == visit.reported:
            visit.report_ms = END_OF_TIME
        return None


class _RealtimeReporter(Reporter):
    """Reports first positives at the end of their tick, and the remaining behaviours at the end."""

    def __init__(self, policy: Realtime) -> None:
        self._tick_ms = policy.tick_ms

    def happened(self, visit: OpenVisit, behaviour: int, time_ms: int) -> None:
        if not visit.seen & behaviour:
            visit.seen |= behaviour
            # Rounded up to the end of the tick; a behaviour at the request itself belongs to the first tick.
            ticks = -(-(time_ms - visit.request_ms) // self._tick_ms) or 1
            visit.report_ms = visit.request_ms + ticks * self._tick_ms

    def due(self, visit: OpenVisit) -> Report | None:
        fresh = visit.seen & ~visit.reported
        visit.reported = visit.seen
        visit.report_ms = END_OF_TIME
        return Report(REPORT, fresh, fresh)

    def end(self, visit: OpenVisit) -> Report | None:
        visit.report_ms = END_OF_TIME
        # Reported behaviours are masked, since they have a row; every other one gets its final label here.
        rest = visit.applies & ~visit.reported
        return Report(EXIT_ROW, visit.seen & rest, rest)


class _NaiveReporter(Reporter):
    """Reports all behaviours at every tick, repeated positives and false negatives included."""

    def __init__(self, tick_ms: int) -> None:
        self._tick_ms = tick_ms

    def first_report_ms(self, visit: OpenVisit) -> int:
        return visit.request_ms + self._tick_ms

    def due(self, visit: OpenVisit) -> Report | None:
        # Every tick starts anew, so a behaviour can be positive in several rows.
        label, visit.seen = visit.seen, 0
        visit.report_ms += self._tick_ms
        return Report(REPORT, label, visit.applies)

    def end(self, visit: OpenVisit) -> Report | None:
        visit.report_ms = END_OF_TIME
        return Report(EXIT_ROW, visit.seen, visit.applies)


def reporter_of(policy: Policy) -> Reporter:
    """Return the reporter of a policy."""
    if isinstance(policy, Full):
        return _FullReporter()
    if isinstance(policy, FastSlow):
        return _FastSlowReporter(policy)
    if isinstance(policy, Realtime):
        return _RealtimeReporter(policy)
    return _NaiveReporter(policy.tick_ms)
