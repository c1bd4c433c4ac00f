"""Measures the time of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "tables", "dense", "communication")
"""Waiting for the loader; table lookups and updates; the dense network and its optimizer; waiting for other ranks."""

_Mark = tuple[str | None, "float | torch.cuda.Event"]


class PhaseClock:
    """Splits the time of a step into phases; an inner phase interrupts the outer one.

    On a CPU it reads the host's clock. On a GPU it records events on the current stream: a phase is then the time that
    the GPU spends on the work queued in it, and nothing waits until the seconds are read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Always the computing stream, also while work is queued on another one.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._phase: str | None = None
        self._marks: list[_Mark] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the context for phase ``name``."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def lap(self) -> PhaseSeconds:
        """Return the phases since the last lap, and start the next one."""
        marks, self._marks = self._marks, []
        self._switch(self._phase)
        return PhaseSeconds([*marks, self._marks[0]])

    def _switch(self, name: str | None) -> None:
        now: float | torch.cuda.Event
        if self._stream is None:
            now = time.perf_counter()
        else:
            now = torch.cuda.Event(enable_timing=True)
            now.record(self._stream)
        self._phase = name
        self._marks.append((name, now))


class PhaseSeconds:
    """Seconds by phase of one lap; added up on request, since a GPU's events complete later."""

    def __init__(self, marks: list[_Mark]) -> None:
        self._marks = marks

    def total(self) -> dict[str, float]:
        """Return the seconds of each of ``PHASES``; on a GPU this waits for the lap's events."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, since), (_, until) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                seconds[name] += _seconds_between(since, until)
        return seconds


def _seconds_between(since: float | torch.cuda.Event, until: float | torch.cuda.Event) -> float:
    if isinstance(since, float) and isinstance(until, float):
        return until - since
    assert isinstance(since, torch.cuda.Event) and isinstance(until, torch.cuda.Event)
    until.synchronize()
    return since.elapsed_time(until) / 1000
