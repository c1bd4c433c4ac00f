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
141     The reader of the output closed the pipe (128 + SIGPIPE).
128+N   A rank was ended by signal N, for example 137 (SIGKILL) when memory ran out.
======  ================================================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from trainer.console.errors import UserError
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


def exit_status(job: Callable[[], int | None]) -> int:
    """Run a command and return its exit status; print a UserError as one line."""
    start_log()
    try:
        return job() or 0
    except UserError as error:
        print(f"limelight: error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
