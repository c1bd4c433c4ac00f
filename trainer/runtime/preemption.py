"""SIGTERM: the machine is wanted back. Training saves its state first, anything else ends at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.console.exit_status import PREEMPTED_STATUS

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """This process was asked to end, and has nothing left to save."""


class Preemption:
    """Listens for SIGTERM from its construction on.

    Attributes:
        asked: SIGTERM has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, SIGTERM only sets :attr:`asked`; it is up to the caller to look.

        Raises:
            Preempted: on leaving without another exception, when it was asked for meanwhile.
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
    """Run a job that saves its state when it is asked to stop: its exit status."""
    try:
        job()
    except Preempted as preempted:
        if preempted.__context__ is not None:
            # A launcher ends the ranks that are left when one has failed; what it did to this one is told.
            raise preempted.__context__ from None
        logger.info("asked to end by SIGTERM; the same command goes on from here")
        return PREEMPTED_STATUS
    return 0
