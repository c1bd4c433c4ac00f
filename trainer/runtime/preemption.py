"""Preemption by SIGTERM: training saves its state first, other work ends at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.console.exit_status import PREEMPTED_STATUS

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """This process was asked to end and has nothing left to save."""


class Preemption:
    """Handles SIGTERM from its construction on.

    Attributes:
        asked: True after SIGTERM.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer SIGTERM inside the context: it only sets :attr:`asked`, which the caller checks.

        Raises:
            Preempted: at the end of the context, if SIGTERM came and no other exception is raised.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            raise Preempted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._deferred:
            raise Preempted


def until_preempted(job: Callable[[], object]) -> int:
    """Run a job that saves its state on SIGTERM, and return its exit status."""
    try:
        job()
    except Preempted as preempted:
        if preempted.__context__ is not None:
            # The launcher ends the remaining ranks after a failure; the exception of this rank comes first.
            raise preempted.__context__ from None
        logger.info("stopped by SIGTERM; the same command resumes from here")
        return PREEMPTED_STATUS
    return 0
