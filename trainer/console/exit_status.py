"""Exit statuses of all commands and jobs, and the conversion of an error into one line and a status.

======  ================================================================================================
status  meaning
======  ================================================================================================
0       The command is done. For ``train`` and ``finetune``: the run is finished.
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
import traceback
from collections.abc import Callable
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


class Terminated(BaseException):
    """SIGTERM has arrived; raised in the main thread, so that a command removes its unfinished files."""


def end_on_sigterm() -> None:
    """Make SIGTERM raise :class:`Terminated` in this process. Jobs that save their state replace the handler."""

    def end(number: int, frame: FrameType | None) -> None:
        # A second signal ends the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == process:
            raise Terminated
        os.kill(os.getpid(), signal.SIGTERM)

    process = os.getpid()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def exit_status(job: Callable[[], int | None]) -> int:
    """Run a command or a rank, and return its exit status.

    A UserError and any other error about a file of the user are printed as one line; the traceback of the latter goes
    to the log only. Any other traceback means a defect of Limelight. If the reader of stdout has closed the pipe,
    nothing is printed.
    """
    start_log()
    try:
        try:
            return job() or 0
        except UserError as error:
            print(f"limelight: error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR_STATUS
        except BrokenPipeError:
            raise
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            logger.debug("".join(traceback.format_exception(error)))
            print(f"limelight: error: {message}", file=sys.stderr, flush=True)
            return USER_ERROR_STATUS
        except KeyboardInterrupt:
            return INTERRUPTED_STATUS
        except Terminated:
            return TERMINATED_STATUS
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
