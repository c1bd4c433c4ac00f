"""Largest number of bytes that torch has allocated on the CPU at a time, by torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def measured_peak(work: Callable[[], Any]) -> int:
    """Return the peak of torch's CPU allocator during ``work``, above the bytes that were allocated before.

    These are the allocations and frees that the allocator itself reports, not the size of the process.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
