"""Process that waits for the end of a job, and marks its run in an MLflow file store if the job was killed.

    python -m trainer.runtime.mlflow_keeper STORE RUN_ID JOB_DIRECTORY MODEL_DIRECTORY JOB_PROCESS

Its input is a pipe from the job, its parent. The job writes a word into it when the end of the run is in the store. If
the job ends without a word, it was ended by SIGKILL, for example because memory ran out, or by the watchdog; or the
store could not be written for a while. The end of the pipe says nothing: processes that the job has forked hold it
open. Nothing can mark the run if the machine goes down; the same command again continues it.

Light until it has something to do: it does not import MLflow before.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from trainer.console.errors import UserError
from trainer.runtime.run_lock import is_locked
from trainer.runtime.run_status import KILLED_REASON, RUNNING, STOPPED, read_status

_LOOK_SECONDS = 0.5
"""Time between two looks at whether the job still runs."""

_UNLOCK_SECONDS = 5.0
"""Time that the kernel may take to release the lock of a process that has ended."""


def main(arguments: list[str]) -> None:
    """Wait for the end of the job, and mark its run if the job has not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A machine that goes down asks every process to end; the job comes first.
        signal.signal(number, signal.SIG_IGN)
    store, run, job, model, process = arguments
    if _word_comes(int(process)):
        return
    until = time.monotonic() + _UNLOCK_SECONDS
    while is_locked(Path(job)):
        if time.monotonic() > until:
            # The job goes on in a new process.
            return
        time.sleep(0.1)
    mark_killed(store, run, Path(job), Path(model))


def _word_comes(process: int) -> bool:
    """Wait for a word of the job or for its end; True for a word."""
    inputs = [sys.stdin.fileno()]
    while True:
        # A process that has ended is no parent any more. Asked first, since the word may be its last act.
        runs = os.getppid() == process
        if select.select(inputs, [], [], _LOOK_SECONDS if runs else 0)[0]:
            if os.read(inputs[0], 1):
                return True
            inputs = []
        elif not runs:
            return False


def mark_killed(store: str, run: str, job: Path, model: Path) -> None:
    """Mark a run whose job has ended without a word.

    Args:
        store: directory of the store.
        run: id of the run.
        job: directory of the job, which has its status.
        model: directory of the model's files.

    Raises:
        UserError: MLflow is not installed, or the store cannot be written.
    """
    from trainer.runtime.mlflow_store import mark_ended, open_client
    from trainer.runtime.tracking import end_of_run

    state, reason = STOPPED, KILLED_REASON
    with suppress(OSError, UserError):
        status = read_status(job)
        if status is not None and status.state != RUNNING:
            state, reason = status.state, status.reason
    mark_ended(open_client(store), run, *end_of_run(model, state, reason))


if __name__ == "__main__":
    main(sys.argv[1:])
