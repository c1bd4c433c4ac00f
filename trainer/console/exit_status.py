"""Exit statuses of all commands, and the one place where an error becomes a line and a status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from trainer.console.errors import UserError
from trainer.console.run_log import start_log

USER_ERROR_STATUS = 2
"""Exit status after a mistake of the user's, told in one line."""


INTERRUPTED_STATUS = 130
"""Exit status after ctrl-C: 128 + SIGINT, as shells have it."""


PREEMPTED_STATUS = 75
"""Exit status after SIGTERM once the state is saved: the same command goes on from there. EX_TEMPFAIL of sysexits.h."""


HUNG_STATUS = 70
"""Exit status of a job that its watchdog ended, because some rank made no progress: trainer/runtime/watchdog.py."""


def exit_status(job: Callable[[], int | None]) -> int:
    """Run a command and give its exit status; a UserError is told in one line, ctrl-C in none."""
    start_log()
    try:
        return job() or 0
    except UserError as error:
        print(f"limelight: error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
