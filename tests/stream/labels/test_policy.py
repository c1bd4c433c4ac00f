"""Tests of policies by name, and of invalid settings."""

from __future__ import annotations

import pytest

from trainer.console.errors import UserError
from trainer.stream.labels.policy import POLICIES, EventTimeouts, FastSlow, Full, Realtime, RealtimeNaive, make_policy


def test_policies_have_the_windows_of_the_paper() -> None:
    made = [make_policy(name) for name in POLICIES]
    assert made == [Full(), FastSlow(300_000, 3_600_000), Realtime(30_000), RealtimeNaive(30_000)]
    assert make_policy("fast_slow", fast_ms=60_000) == FastSlow(60_000, 3_600_000)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("slow_fast", {}, "no report policy 'slow_fast'; known are full, fast_slow, realtime, realtime_naive"),
        ("realtime", {"fast_ms": 3}, "policy realtime has no setting 'fast_ms'; it has tick_ms"),
        ("full", {"tick_ms": 3}, "policy full has no setting 'tick_ms'; it has none"),
        ("fast_slow", {"fast_ms": 0}, "must be above 0"),
        ("fast_slow", {"fast_ms": 5, "slow_ms": 5}, "the slow one longer"),
        ("realtime", {"tick_ms": 0}, "tick_ms is 0"),
        ("realtime_naive", {"tick_ms": -1}, "tick_ms is -1"),
    ],
)
def test_mistakes(name: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy(name, **settings)


def test_waiting_times_are_checked() -> None:
    with pytest.raises(UserError, match="idle_ms is 0"):
        EventTimeouts(idle_ms=0)
    with pytest.raises(UserError, match="max_out_of_orderness_ms is -1"):
        EventTimeouts(max_out_of_orderness_ms=-1)
