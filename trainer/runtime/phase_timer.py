"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "tables", "dense", "communication")
"""Waiting for the loader; looking up and training tables; the dense network and its optimizer; waiting for ranks."""

_Mark = tuple[str | None, "float | torch.cuda.Event"]


class PhaseClock:
    """Splits the time of a step into phases; a phase inside another one interrupts it.

    On a CPU it reads the host's clock. On a GPU it records events on the current stream, so that a phase is the time
    that the GPU spends on what was queued in it, and nothing waits until the seconds are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Phases are those of the stream that computes, also while something is queued on another.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._phase: str | None = None
        self._marks: list[_Mark] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for ``name``."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def lap(self) -> PhaseSeconds:
        """The phases since the last lap."""
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
    """A lap of a :class:`PhaseClock`; adds up when asked, since the events of a GPU are known only then."""

    def __init__(self, marks: list[_Mark]) -> None:
        self._marks = marks

    def total(self) -> dict[str, float]:
        """Seconds of each of ``PHASES``."""
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
