"""The runs of this job in an MLflow file store, from the start of a model to its end, however it ends.

A job is inside of :func:`tracked`, which opens a run for it; a further model of the job, such as a baseline, is inside
of another one. Code that has a scalar to write asks for the innermost run by :func:`tracked_run`.

The store only mirrors a run: the files of the run itself have all that it shows. So a store that cannot be opened is an
error before the job begins, and one that fails later is a warning, once, and costs the job nothing.

An end by an exception is written when it passes by. A process that is killed writes nothing, so another process waits
for its end: ``trainer/runtime/mlflow_keeper.py``.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.console.errors import UserError
from trainer.runtime.mlflow_store import MlflowRun, MlflowTarget
from trainer.runtime.run_status import FINISHED, status_directory, status_of_end

logger = logging.getLogger(__name__)

_DISMISS_SECONDS = 10.0
"""Time that a keeper may take to end; the job does not wait longer."""

_ROOT = Path(__file__).resolve().parents[2]


class TrackedRun:
    """The run of a model, as its job writes to it: an error of the store is a warning, the first time.

    Values that the store did not take are lost there; the next ones are tried again.

    Args:
        run: the run in the store.
    """

    def __init__(self, run: MlflowRun) -> None:
        self._run, self._told = run, False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a value of a step, a few seconds later at most."""
        with self._warned_once():
            self._run.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write all values to the store."""
        with self._warned_once():
            self._run.flush()

    def close(self) -> None:
        """Write all values to the store; the run goes on until the block of its model ends."""
        with self._warned_once():
            self._run.close()

    def finish(self, keeper: subprocess.Popen[bytes]) -> None:
        """Write that the model has finished, and let the process go that waits for the end of the job.

        If the store cannot be written, this process stays, and tries it once more at the end of the job.
        """
        with self._warned_once():
            self._run.end(FINISHED)
            _dismiss(keeper)

    @contextmanager
    def _warned_once(self) -> Iterator[None]:
        """Turn an error of the store in the block into a warning, or into nothing if there was one before."""
        try:
            yield
        except UserError as error:
            if not self._told:
                logger.warning(f"{error}; the job goes on, and its own files are complete")
            self._told = True


_open: list[TrackedRun | None] = []
"""Runs of this process; that of a model inside of another one comes last. None: it could not be opened."""


@contextmanager
def tracked(directory: Path, target: MlflowTarget | None) -> Iterator[None]:
    """Keep the run of a model in its file store: it runs in the block, and then has the end of the block.

    Args:
        directory: of the model's files; a run whose ``metrics.json`` is in it has finished, whatever comes after it.
        target: place of the model; None for no file store, and on every rank but the first.

    Raises:
        UserError: MLflow is not installed, or the store cannot be written as the job starts. For a further model of the
            job, such as a baseline, that is a warning.
    """
    if target is None:
        yield
        return
    try:
        run, process = MlflowRun(directory, target), os.getpid()
    except UserError as error:
        if not _open:
            raise
        logger.warning(f"{error}; the job goes on, and {directory} has the files of this model")
        # Its values belong to no other model.
        _open.append(None)
        try:
            yield
        finally:
            _open.remove(None)
        return
    keeper = _start_keeper(directory, target, run)
    of_model = TrackedRun(run)
    _open.append(of_model)
    try:
        yield
    except BaseException as error:
        # A process that was forked in the block, such as a loader worker, is not the job.
        if os.getpid() == process:
            # The exception that ends the job is told, and not that of a store on a disk that is full.
            with suppress(UserError):
                run.end(*end_of_run(directory, *status_of_end(error)))
                _dismiss(keeper)
        raise
    else:
        of_model.finish(keeper)
    finally:
        _open.remove(of_model)


def tracked_run() -> TrackedRun | None:
    """Return the run of the innermost model; None without a file store, and on every rank but the first."""
    return _open[-1] if _open else None


def record_scalars(values: Mapping[str, float], step: int) -> None:
    """Write scalars of a step to the run of the innermost model, if it has one."""
    if (run := tracked_run()) is not None:
        for name, value in values.items():
            run.add_scalar(name, value, step)
        run.flush()


def end_of_run(directory: Path, state: str, reason: str) -> tuple[str, str]:
    """Return state and reason of a model's run; a model with ``metrics.json`` has finished before its job ended."""
    return (FINISHED, "") if (directory / "metrics.json").exists() else (state, reason)


def _start_keeper(directory: Path, target: MlflowTarget, run: MlflowRun) -> subprocess.Popen[bytes]:
    """Start the process that marks a run whose job is killed."""
    job = status_directory() or directory
    arguments = [Path(target.store).absolute(), run.run_id, job.absolute(), directory.absolute(), os.getpid()]
    path = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "trainer.runtime.mlflow_keeper", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A session of its own: a launcher ends all processes of the session of a rank.
        start_new_session=True,
    )


def _dismiss(keeper: subprocess.Popen[bytes]) -> None:
    """Tell a keeper that the end is written, and wait until it has gone."""
    with suppress(OSError, subprocess.TimeoutExpired):
        keeper.communicate(b"ended", timeout=_DISMISS_SECONDS)
