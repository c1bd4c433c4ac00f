"""Processes that are forked from the test, and so need no seconds to import what the test has imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def forked() -> Iterator[int]:
    """Fork a process that lives inside the ``with`` statement; yield its process id."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        yield child
    finally:
        os.close(writing)
        os.close(reading)
        assert os.waitpid(child, 0)[1] == 0


class ForkedJob:
    """A function in a forked process with a session of its own, whose standard output is read by the test.

    Args:
        run: the function; its exception is printed, and makes the exit status 1.

    Attributes:
        pid: process id.
        stdout: what the process prints.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setsid()
                os.close(reading)
                os.dup2(writing, 1)
                os.close(writing)
                sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
                run()
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                # Without exit handlers, which belong to the test.
                os._exit(status)
        os.close(writing)
        self.stdout = open(reading)  # noqa: SIM115
        self._status: int | None = None

    def wait(self) -> int:
        """Wait for the end. Returns the exit status, negative for a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def close(self) -> None:
        """Kill the process, and all that it has forked."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        self.stdout.close()
