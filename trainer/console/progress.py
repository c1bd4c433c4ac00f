"""Progress of long work: a bar with an ETA on a terminal, one line every few seconds elsewhere and in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

from trainer.console.text_table import duration_text

logger = logging.getLogger(__name__)


LINE_EVERY_SECONDS = 5.0
"""Pause between two plain lines."""

_listeners: list[Callable[[Progress], None]] = []
"""Functions that are called whenever a line is due."""


@contextmanager
def listening(listener: Callable[[Progress], None]) -> Iterator[None]:
    """Call ``listener`` with every progress of the block: at its start, every few seconds, and at its end."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Progress:
    """Shows the progress of one piece of work; a context manager.

    Args:
        label: name of the work, such as ``train``.
        total: amount of work in ``unit``.
        unit: unit of the work, such as ``rows``.
        done: amount that an earlier process has done.
        quiet: show nothing on the terminal (every rank but the first); the rank's log has the lines all the same.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._done_before = done
        self.started = time.monotonic()
        self._quiet = quiet
        self._said = self.started
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        self._notify()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            self._line("", time.monotonic())

    def advance(self, amount: int, remark: str = "") -> None:
        """Add ``amount`` to the work done; ``remark`` is shown beside the figures."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            self._bar.set_postfix_str(remark, refresh=False)
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_SECONDS:
            self._said = now
            self._line(remark, now)

    @property
    def per_second(self) -> float:
        """Work per second of this process."""
        return (self.done - self._done_before) / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all work is done at the rate so far; None if the rate is not known yet."""
        if self.total <= self.done:
            return 0.0
        return (self.total - self.done) / self.per_second if self.per_second > 0 else None

    def _line(self, remark: str, now: float) -> None:
        self._notify()
        share = 100 * self.done / self.total if self.total else 100.0
        line = (
            f"{self.label}: {self.done:,}/{self.total:,} {self.unit} ({share:.0f} %), {self.per_second:,.0f} "
            f"{self.unit}/s, {duration_text(now - self.started)} so far, ETA {duration_text(self.seconds_left or 0.0)}"
            + (f", {remark}" if remark else "")
        )
        if self._quiet or self._bar is not None:
            logger.debug(line)
        else:
            logger.info(line)

    def _notify(self) -> None:
        for listener in _listeners:
            listener(self)


class Phases:
    """Shows work in phases, each with its own progress; called with the phase's name, the work done and the total.

    Args:
        units: phase -> unit of its work.
        other: unit of the other phases.
    """

    def __init__(self, units: Mapping[str, str], other: str = "parts", *, quiet: bool = False) -> None:
        self._units, self._other, self._quiet = units, other, quiet
        self._phase: Progress | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._phase is None or self._phase.label != what:
            self.__exit__(None, None, None)
            self._phase = Progress(what, total, self._units.get(what, self._other), quiet=self._quiet)
        self._phase.advance(done - self._phase.done)

    def __enter__(self) -> Phases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._phase is not None:
            self._phase.__exit__(kind, error, trace)
            self._phase = None
