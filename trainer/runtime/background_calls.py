"""Calls that a thread makes one after another, while the caller goes on with its own work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

import torch


class BackgroundCalls:
    """Calls in the order in which they were asked for: by one thread, or at once.

    The caller waits in :meth:`call` if the thread is ``LIMIT`` calls behind, and in :meth:`settle`. If a call raises an
    error, the later ones are left out, and the caller gets the error. It gets it after the same call in each process
    that asks for the same calls, however fast the threads are: ``LIMIT`` calls later, or in :meth:`settle`. So errors
    that are raised on all ranks stop all of them together.

    A context manager that ends the thread.

    Args:
        threaded: use a thread; otherwise :meth:`call` makes the call itself.
    """

    LIMIT = 8
    """Calls that may wait for the thread; what they hold stays in memory."""

    def __init__(self, threaded: bool = False) -> None:
        self.threaded = threaded
        self._waiting: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._unsettled: list[_Call] = []
        self._thread: threading.Thread | None = None

    def __enter__(self) -> BackgroundCalls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            # After an error the thread may wait for a rank that is lost, so it is not joined.
            if self._thread is not None:
                self._waiting.put(None)
                self._thread = None

    def call(self, function: Callable[[], object]) -> None:
        """Call a function after those before it.

        Raises:
            Exception: an earlier call raised it; without a thread, this one.
        """
        if not self.threaded:
            function()
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(torch.get_num_threads(),), name="background calls", daemon=True
            )
            self._thread.start()
        if len(self._unsettled) >= self.LIMIT:
            self._unsettled.pop(0).result()
        call = _Call(function)
        self._unsettled.append(call)
        self._waiting.put(call)

    def settle(self) -> None:
        """Wait for all calls.

        Raises:
            Exception: a call raised it.
        """
        while self._unsettled:
            self._unsettled.pop(0).result()

    def _run(self, threads: int) -> None:
        # A sum may be rounded otherwise with another number of threads.
        torch.set_num_threads(threads)
        failed = False
        while (call := self._waiting.get()) is not None:
            failed = not call.make(skip=failed)


class _Call:
    """One call, and its error."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function
        self._done = threading.Event()
        self.error: BaseException | None = None

    def make(self, *, skip: bool) -> bool:
        """Make the call, or skip it; its function, with all that it holds, is then released. Returns True if made."""
        function, self._function = self._function, None
        try:
            if function is not None and not skip:
                function()
        except BaseException as error:
            # The caller would wait for ever for a thread that ends.
            self.error = error
        self._done.set()
        return not skip and self.error is None

    def result(self) -> None:
        """Wait for the call, and raise its error."""
        self._done.wait()
        if self.error is not None:
            raise self.error
