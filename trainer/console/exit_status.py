"""Exit statuses of all commands and jobs, and the conversion of an error into one line and a status.

======  ================================================================================================
status  meaning
======  ================================================================================================
0       The command is done. For ``train``, ``finetune`` and ``foresight``: the run is finished.
1       A check failed: ``checkpoint verify`` found a damaged checkpoint, ``checkpoint diff`` found different
        tensors, ``doctor`` found a failure. Of a job: an exception that is not the user's mistake.
2       A mistake of the user, described in one line on stderr.
70      The watchdog ended the job because a rank made no progress (EX_SOFTWARE of sysexits.h).
75      The job received SIGTERM and saved its state; the same command continues (EX_TEMPFAIL of sysexits.h).
130     Interrupted by ctrl-C (128 + SIGINT).
143     A command without state to save was ended by SIGTERM (128 + SIGTERM).
141     The reader of the output closed the pipe (128 + SIGPIPE).
128+N   A rank was ended by signal N, for example 137 (SIGKILL) when memory ran out.
======  ================================================================================================
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from trainer.console.errors import UserError, user_message
from trainer.console.run_log import start_log

CHECK_FAILED_STATUS = 1
"""A check failed: a damaged checkpoint, different tensors, a failure that the doctor found."""

USER_ERROR_STATUS = 2
"""A mistake of the user, described in one line."""

HUNG_STATUS = 70
"""The watchdog ended the job because a rank made no progress: trainer/runtime/watchdog.py."""

PREEMPTED_STATUS = 75
"""The job received SIGTERM and saved its state; the same command continues."""

INTERRUPTED_STATUS = 130
"""Ctrl-C: 128 + SIGINT."""

BROKEN_PIPE_STATUS = 141
"""The reader of the output closed the pipe: 128 + SIGPIPE."""


TERMINATED_STATUS = 143
"""SIGTERM ended a command that has no state to save: 128 + SIGTERM."""

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.05
"""Pause before the exception of a signal is raised again, if it was lost."""

_arrived: list[int] = []
"""Signals that have ended the work of this process; a library may have turned their exception into another one."""


class Terminated(BaseException):
    """SIGTERM has arrived; raised in the main thread, so that a command removes its unfinished files."""


def end_on_sigterm() -> None:
    """Make SIGTERM raise :class:`Terminated` in this process. Jobs that save their state replace the handler."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _raise_on(signal.SIGTERM, Terminated)


def end_on_ctrl_c() -> None:
    """Make SIGINT raise KeyboardInterrupt in this process, and unblock it.

    ``launch.local`` starts ranks with SIGINT blocked, and ends those that have not come to this call yet.
    """
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _raise_on(signal.SIGINT, KeyboardInterrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _raise_on(number: int, error: type[BaseException]) -> None:
    """Make a signal raise an exception, which is not lost; a second signal ends the process at once.

    An exception inside an import is often lost: C extensions drop it, or fail with an ImportError at the next attempt.
    So the end of the import is awaited, unless a command imports its work: then nothing has begun. An exception inside
    a callback of the interpreter, such as one around a fork, is lost too, and is raised again.
    """
    process = os.getpid()
    raised: list[BaseException] = []

    def end(arrived: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:
            # A forked worker, which has nothing to remove.
            os.kill(os.getpid(), number)
        _arrived.append(number)
        signal.signal(signal.SIGALRM, attempt)
        attempt(arrived, frame)

    def attempt(arrived: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return
        importer = _importer(frame)
        if importer is not None and importer.f_globals.get("__name__", "").startswith("launch.cli."):
            os._exit(128 + number)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        if importer is None and not _in_logging(frame) and not any(error in raised for error in _handled()):
            raised.append(error())
            raise raised[-1]

    signal.signal(number, end)


def _importer(frame: FrameType | None) -> FrameType | None:
    """Return the first of a frame's callers that executes an import statement; None if no module is imported."""
    importer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    return importer


def _in_logging(frame: FrameType | None) -> bool:
    """True if a frame or one of its callers is in logging, which has callbacks around a fork."""
    while frame is not None:
        if frame.f_code.co_filename == logging.__file__:
            return True
        frame = frame.f_back
    return False


def _handled() -> Iterator[BaseException]:
    """Yield the exception that is being handled, such as in a ``finally``, and those that it followed."""
    error = sys.exc_info()[1]
    while error is not None:
        yield error
        error = error.__context__


def exit_status(job: Callable[[], int | None]) -> int:
    """Run a command or a rank, and return its exit status.

    A UserError and any other error about a file of the user are printed as one line; the traceback of the latter goes
    to the log only. Any other traceback means a defect of Limelight. If the reader of stdout has closed the pipe, or
    after ctrl-C or SIGTERM, nothing is printed.
    """
    start_log()
    _arrived.clear()
    ctrl_c, alarm = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    try:
        return _status_of(job)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, alarm)
            if not _arrived:
                signal.signal(signal.SIGINT, ctrl_c)


def _status_of(job: Callable[[], int | None]) -> int:
    try:
        try:
            end_on_ctrl_c()
            return job() or 0
        except KeyboardInterrupt:
            return INTERRUPTED_STATUS
        except Terminated:
            return TERMINATED_STATUS
        except UserError as error:
            print(f"limelight: error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR_STATUS
        except BrokenPipeError:
            raise
        except Exception as error:
            if _arrived:
                # Such as the ImportError of a C extension whose import was interrupted.
                logger.debug("".join(traceback.format_exception(error)))
                return 128 + _arrived[0]
            message = user_message(error)
            if message is None:
                raise
            logger.debug("".join(traceback.format_exception(error)))
            print(f"limelight: error: {message}", file=sys.stderr, flush=True)
            return USER_ERROR_STATUS
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_has_no_reader():
            raise
        # Python flushes stdout once more when it exits, which would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_STATUS


def _stdout_has_no_reader() -> bool:
    """True if stdout is a pipe that its reader has closed; any other broken pipe is an error of the work."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
