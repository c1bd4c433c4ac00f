"""Runs in an MLflow file store: settings, scalars and metrics of a model, which ``mlflow ui`` shows beside others.

MLflow opens a file store only where ``MLFLOW_ALLOW_FILE_STORE`` is true, since its makers prefer databases; this module
sets it for its own process, and a user sets it for ``mlflow ui``. It also switches off MLflow's reports of its use.

The run of a model has its id in ``mlflow.json`` beside the checkpoints, so that a job that is continued continues it.
Steps after the checkpoint are repeated then, and stand twice in the store.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.console.errors import UserError, one_line
from trainer.console.setup_advice import MLFLOW
from trainer.runtime.files import write_json
from trainer.runtime.stored_files import read_json_object

T = TypeVar("T")

RUN_ID = "mlflow.json"

_ENVIRONMENT = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
_AT_ONCE = 500
"""Metrics of a call; a file store accepts 1,000."""

_MOST_PARAMS = 100
_LONGEST_PARAM = 500
_REFUSED = re.compile(r"[^\w\-. :/]", re.ASCII)


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

    Raises:
        UserError: MLflow is not installed, or the store cannot be written.
    """

    def __init__(self, directory: Path, target: MlflowTarget) -> None:
        self._store = target.store
        self._client = _client(target.store)
        self._waiting: list[Any] = []
        self._id = _checked(self._store, lambda: self._continued(directory) or self._created(directory, target))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Keep a value for the next flush; one that is not finite is left out."""
        from mlflow.entities import Metric

        if math.isfinite(value):
            self._waiting.append(Metric(_REFUSED.sub("_", name), float(value), round(1000 * time.time()), step))
        if len(self._waiting) >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the values that are kept."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            _checked(self._store, lambda: self._client.log_batch(self._id, metrics=waiting))

    def close(self) -> None:
        """Write the values that are kept, and mark the run as finished."""
        self.flush()
        _checked(self._store, lambda: self._client.set_terminated(self._id, "FINISHED"))

    def _continued(self, directory: Path) -> str | None:
        """Return the id of the run that an earlier start has made; None if there is none in this store."""
        from mlflow.exceptions import MlflowException

        try:
            stored = read_json_object(directory / RUN_ID)
        except FileNotFoundError:
            return None
        if stored.get("store") != self._store:
            return None
        try:
            return str(self._client.update_run(str(stored.get("run_id")), status="RUNNING") or stored["run_id"])
        except MlflowException:
            # The run was deleted from the store.
            return None

    def _created(self, directory: Path, target: MlflowTarget) -> str:
        from mlflow.entities import Param, RunTag

        found = self._client.get_experiment_by_name(target.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(target.experiment)
        run = str(self._client.create_run(experiment, run_name=target.name).info.run_id)
        params = [Param(_REFUSED.sub("_", key), str(value)[:_LONGEST_PARAM]) for key, value in target.settings.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run, params=params[first : first + _MOST_PARAMS])
        self._client.log_batch(run, tags=[RunTag("limelight.directory", str(directory))])
        write_json(directory / RUN_ID, {"store": target.store, "run_id": run})
        return run


def write_last_metrics(directory: Path, target: MlflowTarget, metrics: Mapping[str, float], step: int) -> None:
    """Write the metrics at the end of a model.

    Args:
        directory: of the model's files.
        target: place of the model.
        metrics: name -> value.
        step: last step.

    Raises:
        UserError: as :class:`MlflowRun`.
    """
    run = MlflowRun(directory, target)
    for name, value in metrics.items():
        run.add_scalar(name, value, step)
    run.close()


def _client(store: str) -> Any:
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
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except (OSError, MlflowException) as error:
        raise UserError(f"run.mlflow = {store!r}: cannot be written ({one_line(error):.200})") from None
