"""Report policies: the rows that a visit gives and their times (Moment&Cross: label streams of 5 min and of 30 s).

**Visits.** A visit is all events with one ``(user_id, visit_id)``, from its first exposure or enter, ``request_ms``, to
its end. A user may have several open visits at once. A visit ends with its first exit; without an exit it ends
``idle_ms`` after its last event. Its ids and domain are those of its first event. All events at the millisecond of the
end still belong to it, because events of one millisecond are simultaneous. A later event, or one before the start,
belongs to no visit and changes no row; an exposure or enter after the end starts another visit with the same id.

**Behaviours.** Only the first event of each behaviour counts, except under ``realtime_naive``, which counts repeated
ones too. A behaviour that does not apply in the visit's domain gives no label; it only shows that the visit is not
idle. A duplicate of an event changes nothing.

**Rows.** With ``t = 0`` at the request. As in the paper, windows include their right edge; the first window also
includes its left edge, because a behaviour may happen there:

==================  ======  =============================  =========================  =====================
policy              kind    ``emit_ms``                    label 1                    unmasked
==================  ======  =============================  =========================  =====================
``full``            full    the end                        happened                   all
``fast_slow``       fast    request + ``fast_ms``          happened in [0, fast]      all
                    slow    request + ``slow_ms``          all that is unmasked       first in (fast, slow]
``realtime``        report  request + m ``tick_ms`` < end  all that is unmasked       first in tick m
                    exit    the end                        first since the last tick  not yet reported
``realtime_naive``  report  request + m ``tick_ms`` < end  happened in tick m         all
                    exit    the end                        since the last tick        all
==================  ======  =============================  =========================  =====================

Tick m is ``((m - 1) tick_ms, m tick_ms]``; the first tick also includes 0. "All" means all behaviours that apply in the
domain. Fast and slow rows come at their time, even if the visit has ended. ``realtime`` makes a report row only for a
tick with a first positive, ``realtime_naive`` for every tick. A row without an unmasked behaviour is not made: there is
no slow row if the fast row missed no positive.

**Order.** Rows of a partition are in order of ``(emit_ms, user_id, visit_id, request_ms)``, which no two rows share.

**Late events.** The watermark is ``max_out_of_orderness_ms`` behind the latest event of the partition. An event that is
before the watermark when it arrives is late: it changes no row and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from trainer.config.stream import LabelConfig
from trainer.console.errors import UserError

SECOND_MS, MINUTE_MS, HOUR_MS = 1_000, 60_000, 3_600_000


@dataclass(frozen=True)
class Full:
    """One row at the end of the visit: complete labels, with their real delay."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class FastSlow:
    """One row after ``fast_ms``, and one after ``slow_ms`` with the positives that the fast row denied."""

    name: ClassVar[str] = "fast_slow"
    fast_ms: int = 5 * MINUTE_MS
    slow_ms: int = HOUR_MS

    def __post_init__(self) -> None:
        """Check the windows.

        Raises:
            UserError: ``0 < fast_ms < slow_ms`` does not hold.
        """
        if not 0 < self.fast_ms < self.slow_ms:
            raise UserError(
                f"fast_slow: windows of {self.fast_ms} and {self.slow_ms} ms; "
                "the fast one must be above 0 and the slow one longer"
            )


@dataclass(frozen=True)
class Realtime:
    """First positives every ``tick_ms``, the other labels at the end: the paper's first-only mask."""

    name: ClassVar[str] = "realtime"
    tick_ms: int = 30 * SECOND_MS

    def __post_init__(self) -> None:
        """Check the tick.

        Raises:
            UserError: ``tick_ms`` is not above 0.
        """
        _check_tick(self.name, self.tick_ms)


@dataclass(frozen=True)
class RealtimeNaive:
    """All labels every ``tick_ms``, with false negatives and repeated positives; for comparison only."""

    name: ClassVar[str] = "realtime_naive"
    tick_ms: int = 30 * SECOND_MS

    def __post_init__(self) -> None:
        """Check the tick.

        Raises:
            UserError: ``tick_ms`` is not above 0.
        """
        _check_tick(self.name, self.tick_ms)


Policy = Full | FastSlow | Realtime | RealtimeNaive

POLICIES: dict[str, type[Full] | type[FastSlow] | type[Realtime] | type[RealtimeNaive]] = {
    policy.name: policy for policy in (Full, FastSlow, Realtime, RealtimeNaive)
}
"""Policy classes by the name in a config."""


@dataclass(frozen=True)
class EventTimeouts:
    """Waiting times for events.

    Attributes:
        idle_ms: a visit without an exit ends this long after its last event.
        max_out_of_orderness_ms: an event may come this much behind a later event of its partition; rows are delayed
            by the same time.
    """

    idle_ms: int = 2 * HOUR_MS
    max_out_of_orderness_ms: int = 10 * SECOND_MS

    def __post_init__(self) -> None:
        """Check the waiting times.

        Raises:
            UserError: ``idle_ms`` is not above 0, or ``max_out_of_orderness_ms`` is negative.
        """
        if self.idle_ms <= 0:
            raise UserError(f"idle_ms is {self.idle_ms}; it must be above 0")
        if self.max_out_of_orderness_ms < 0:
            raise UserError(f"max_out_of_orderness_ms is {self.max_out_of_orderness_ms}; it must be 0 or more")


def report_policy(labels: LabelConfig) -> Policy:
    """Return the report policy of the ``[labels]`` section of a job."""
    match labels.policy:
        case "full":
            return Full()
        case "fast_slow":
            return FastSlow(labels.fast_ms, labels.slow_ms)
        case "realtime":
            return Realtime(labels.tick_ms)
        case "realtime_naive":
            return RealtimeNaive(labels.tick_ms)


def event_timeouts(labels: LabelConfig) -> EventTimeouts:
    """Return the waiting times of the ``[labels]`` section of a job."""
    return EventTimeouts(labels.idle_ms, labels.max_out_of_orderness_ms)


def make_policy(name: str, **settings: int) -> Policy:
    """Return the policy of a name, with settings in milliseconds.

    Raises:
        UserError: the name is unknown, the policy does not have a setting, or a value is out of range.
    """
    if name not in POLICIES:
        raise UserError(f"no report policy {name!r}; known are {', '.join(POLICIES)}")
    known = [field.name for field in fields(POLICIES[name])]
    for setting in settings:
        if setting not in known:
            accepted = ", ".join(known) or "none"
            raise UserError(f"policy {name} has no setting {setting!r}; it has {accepted}")
    return POLICIES[name](**settings)


def _check_tick(name: str, tick_ms: int) -> None:
    """Raise if ``tick_ms`` is not above 0."""
    if tick_ms <= 0:
        raise UserError(f"{name}: tick_ms is {tick_ms}; it must be above 0")
