"""Runs in an MLflow file store, which ``mlflow ui`` shows: settings, scalars, metrics and state of a model.

MLflow opens a file store only where ``MLFLOW_ALLOW_FILE_STORE`` is true, since its makers prefer databases; this module
sets it for its own process, and a user sets it for ``mlflow ui``. It also switches off MLflow's reports of its use.

The run of a model has its id in ``mlflow.json`` beside the checkpoints, so that a job that is continued continues it.
Steps after the checkpoint are repeated then, and stand twice in the store.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.console.errors import UserError, one_line
from trainer.console.setup_advice import MLFLOW
from trainer.runtime.files import write_json
from trainer.runtime.mlflow_names import StoreNames
from trainer.runtime.run_status import FAILED, FINISHED, STOPPED
from trainer.runtime.stored_files import read_json_object

T = TypeVar("T")

RUN_ID = "mlflow.json"

REASON = "limelight.reason"
"""Tag with the reason for which a run has stopped or failed."""

_STATES = {FINISHED: "FINISHED", FAILED: "FAILED", STOPPED: "KILLED"}
"""State of a job -> state of its run in the store."""

_ENVIRONMENT = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
_AT_ONCE = 500
"""Metrics of a call; a file store accepts 1,000."""

_EVERY_SECONDS = 10.0
"""Time after which values are written although they are few, so that the page follows a running job."""

_MOST_PARAMS = 100
_LONGEST_TEXT = 500


@dataclass(frozen=True)
class MlflowTarget:
    """Place of a model in a file store.

    Attributes:
        store: directory of the store.
        experiment: name of the experiment, which is that of the run.
        name: of the model's run.
        settings: dotted key -> value.
    """

    store: str
    experiment: str
    name: str
    settings: Mapping[str, Any]


class MlflowRun:
    """The run of a model in a file store; it is made, or continued.

    Args:
        directory: of the model's files.
        target: place of the model.

    Attributes:
        run_id: id of the run in the store.

    Raises:
        UserError: MLflow is not installed, or the store cannot be written.
    """

    def __init__(self, directory: Path, target: MlflowTarget) -> None:
        self._store = target.store
        self._client = open_client(target.store)
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()
        self.run_id = _checked(self._store, lambda: self._opened(directory, target))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Keep a value for the next flush, a few seconds later at most; one that is not finite is left out.

        Raises:
            UserError: the store cannot be written.
        """
        from mlflow.entities import Metric

        if math.isfinite(value):
            self._waiting.append(Metric(self._names.of(name), float(value), round(1000 * time.time()), step))
        if len(self._waiting) >= _AT_ONCE or time.monotonic() - self._flushed >= _EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the values that are kept.

        Raises:
            UserError: the store cannot be written.
        """
        waiting, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        if waiting:
            _checked(self._store, lambda: self._client.log_batch(self.run_id, metrics=waiting))

    def close(self) -> None:
        """Write the values that are kept; the run goes on until :meth:`end`."""
        self.flush()

    def end(self, state: str, reason: str = "") -> None:
        """Write the values that are kept, and how the job has ended.

        Args:
            state: ``finished``, ``failed`` or ``stopped``.
            reason: of a failure or a stop, in one line.

        Raises:
            UserError: the store cannot be written.
        """
        try:
            self.flush()
        finally:
            _checked(self._store, lambda: mark_ended(self._client, self.run_id, state, reason))

    def _opened(self, directory: Path, target: MlflowTarget) -> str:
        """Return the id of the run that an earlier start has made, or of a new one, and write its settings."""
        from mlflow.entities import Param, RunTag

        run = self._continued(directory) or self._created(directory, target)
        try:
            stored = self._client.get_run(run).data
            self._names = StoreNames(stored.metrics)
            names = StoreNames(stored.params)
            settings = {names.of(key): str(value)[:_LONGEST_TEXT] for key, value in target.settings.items()}
            # The settings of a run that is continued are there; a store refuses to change a parameter.
            params = [Param(key, value) for key, value in settings.items() if key not in stored.params]
            for first in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(run, params=params[first : first + _MOST_PARAMS])
            self._client.log_batch(run, tags=[RunTag("limelight.directory", str(directory))])
        except BaseException:
            with suppress(Exception):
                self._client.set_terminated(run, _STATES[FAILED])
            raise
        return run

    def _continued(self, directory: Path) -> str | None:
        """Return the id of the run that an earlier start has made; None if there is none in this store."""
        from mlflow.exceptions import MlflowException

        try:
            stored = read_json_object(directory / RUN_ID)
        except FileNotFoundError:
            return None
        if stored.get("store") != self._store:
            return None
        run = str(stored.get("run_id"))
        try:
            self._client.update_run(run, status="RUNNING")
        except MlflowException:
            # The run was deleted from the store.
            return None
        with suppress(MlflowException):
            # The reason of an earlier end; most runs have none.
            self._client.delete_tag(run, REASON)
        return run

    def _created(self, directory: Path, target: MlflowTarget) -> str:
        found = self._client.get_experiment_by_name(target.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(target.experiment)
        directory.mkdir(parents=True, exist_ok=True)
        run = str(self._client.create_run(experiment, run_name=target.name).info.run_id)
        # At once: the next start continues a run that could not be opened.
        write_json(directory / RUN_ID, {"store": target.store, "run_id": run})
        return run


def mark_ended(client: Any, run_id: str, state: str, reason: str) -> None:
    """Write how a job has ended to its run in a store; the arguments are those of :meth:`MlflowRun.end`."""
    if reason:
        client.set_tag(run_id, REASON, reason[:_LONGEST_TEXT])
    client.set_terminated(run_id, _STATES[state])


def open_client(store: str) -> Any:
    """Return MLflow's client of a file store.

    Raises:
        UserError: MLflow is not installed, or the store cannot be written.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise UserError(f"run.mlflow = {store!r}: {MLFLOW.advice}") from None
    return _checked(store, lambda: MlflowClient(Path(store).absolute().as_uri()))


def _checked(store: str, call: Callable[[], T]) -> T:
    """Return what a call of MLflow returns.

    Raises:
        UserError: the store cannot be written.
    """
    try:
        with _without_tracebacks():
            return call()
    except UserError:
        raise
    except Exception as error:
        # A damaged file of the store gives errors of any kind: YAML's, and TypeError where a list is no mapping.
        raise UserError(f"run.mlflow = {store!r}: damaged or cannot be written ({one_line(error):.200})") from None


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Let MLflow warn in one line, instead of with a traceback, of a damaged experiment that it passes over."""

    def shorten(record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True

    logging.getLogger().addFilter(shorten)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(shorten)
