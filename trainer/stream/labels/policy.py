"""Report policies: which training rows a visit gives, and when (Moment&Cross, label streams of 5 minutes and of 30 s).

**Visits.** A visit is what has one ``(user_id, visit_id)``, from its first exposure or enter, ``request_ms``, to its
end. Several visits of a user may be open at once. A visit ends with its first exit; where none comes, ``idle_ms`` after
its last event. Its ids and domain are those of its first event. Everything at the millisecond of the end still belongs
to it: events of one millisecond are simultaneous. What comes later, or before the beginning, belongs to no visit and is
set aside; an exposure or enter after the end begins another visit with the same id.

**Behaviours.** The first one of its kind counts; ``realtime_naive`` alone counts repeated ones too. A behaviour that
does not apply in the visit's domain is no label, only a sign of life. The same event twice is one.

**Rows.** With ``t = 0`` at the request and windows that hold their right edge, as the paper has them (and the first
window its left edge, where a behaviour may lie as well):

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

Tick m is ``((m - 1) tick_ms, m tick_ms]``; the first one also holds 0. "All" are the behaviours that apply in the
domain. Fast and slow rows come at their time whether the visit has ended or not. ``realtime`` reports a tick only where
something happened first in it, ``realtime_naive`` every one. A row in which nothing is unmasked is not made: there is
no slow row where the fast row missed nothing.

**Order.** Rows of a partition are in order of ``(emit_ms, user_id, visit_id, request_ms)``, which no two rows share.

**Late events.** The watermark follows the latest event of the partition at a distance of ``max_out_of_orderness_ms``.
An event before the watermark at its arrival is late: it is set aside and counted, and changes no row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from trainer.config.stream import LabelConfig
from trainer.console.errors import UserError

SECOND_MS, MINUTE_MS, HOUR_MS = 1_000, 60_000, 3_600_000


@dataclass(frozen=True)
class Full:
    """One row at the end of the visit: the yardstick, with the delay that it really has."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class FastSlow:
    """A row after ``fast_ms``, and one after ``slow_ms`` with the positives that the first one denied."""

    name: ClassVar[str] = "fast_slow"
    fast_ms: int = 5 * MINUTE_MS
    slow_ms: int = HOUR_MS

    def __post_init__(self) -> None:
        """Raises: UserError: not ``0 < fast_ms < slow_ms``."""
        if not 0 < self.fast_ms < self.slow_ms:
            raise UserError(
                f"fast_slow: windows of {self.fast_ms} and {self.slow_ms} ms; "
                "the fast one must be above 0 and the slow one longer"
            )


@dataclass(frozen=True)
class Realtime:
    """First positives every ``tick_ms``, the rest at the end: the first-only mask."""

    name: ClassVar[str] = "realtime"
    tick_ms: int = 30 * SECOND_MS

    def __post_init__(self) -> None:
        """Raises: UserError: ``tick_ms`` is not above 0."""
        _check_tick(self.name, self.tick_ms)


@dataclass(frozen=True)
class RealtimeNaive:
    """Positives and negatives every ``tick_ms``: false negatives and repeated positives, for comparison only."""

    name: ClassVar[str] = "realtime_naive"
    tick_ms: int = 30 * SECOND_MS

    def __post_init__(self) -> None:
        """Raises: UserError: ``tick_ms`` is not above 0."""
        _check_tick(self.name, self.tick_ms)


Policy = Full | FastSlow | Realtime | RealtimeNaive

POLICIES: dict[str, type[Full] | type[FastSlow] | type[Realtime] | type[RealtimeNaive]] = {
    policy.name: policy for policy in (Full, FastSlow, Realtime, RealtimeNaive)
}
"""Policies by the name that a config gives."""


@dataclass(frozen=True)
class EventTimeouts:
    """How long to wait.

    Attributes:
        idle_ms: for another event of a visit, before it is taken to have ended.
        max_out_of_orderness_ms: for events that come after later ones of the same partition; rows are handed out as
            much later.
    """

    idle_ms: int = 2 * HOUR_MS
    max_out_of_orderness_ms: int = 10 * SECOND_MS

    def __post_init__(self) -> None:
        """Raises: UserError: ``idle_ms`` is not above 0, or ``max_out_of_orderness_ms`` is negative."""
        if self.idle_ms <= 0:
            raise UserError(f"idle_ms is {self.idle_ms}; it must be above 0")
        if self.max_out_of_orderness_ms < 0:
            raise UserError(f"max_out_of_orderness_ms is {self.max_out_of_orderness_ms}; it must be 0 or more")


def report_policy(labels: LabelConfig) -> Policy:
    """The report policy of the ``[labels]`` section of a job."""
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
    """The waiting times of the ``[labels]`` section of a job."""
    return EventTimeouts(labels.idle_ms, labels.max_out_of_orderness_ms)


def make_policy(name: str, **settings: int) -> Policy:
    """The policy of a name, with its settings in milliseconds.

    Raises:
        UserError: an unknown name, a setting that the policy does not have, or a value that it cannot have.
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
    if tick_ms <= 0:
        raise UserError(f"{name}: tick_ms is {tick_ms}; it must be above 0")
