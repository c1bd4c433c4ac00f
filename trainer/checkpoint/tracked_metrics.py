"""Settings, and metrics at the end, that a job hands to the MLflow file store that ``run.mlflow`` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from trainer.config.diff import flat_settings
from trainer.config.sections import TrackingConfig
from trainer.runtime.files import write_json
from trainer.runtime.mlflow_store import MlflowTarget
from trainer.runtime.tracking import record_scalars, tracked

_SECTIONS = {
    "behaviours": "held_out",
    "retrieval": "retrieval",
    "evaluation": "evaluation",
    "all": "held_out",
    "progressive": "progressive",
    "stream.progressive": "stream",
}
"""Section of ``metrics.json`` -> first part of the names of its metrics."""


class TrackedJob(Protocol):
    """Job whose runs may go to a file store."""

    @property
    def run(self) -> TrackingConfig:
        """Name of its runs, and the store."""
        ...


def mlflow_target(config: TrackedJob, directory: Path, baseline: str = "") -> MlflowTarget | None:
    """Return the place of a model in the file store of its job; None without one.

    Args:
        config: the job; its runs of one name are an experiment.
        directory: of the model's files, which names its run: that of the job, or of a baseline in it.
        baseline: kind of the baseline; empty for the job's own model.
    """
    if not config.run.mlflow:
        return None
    assert isinstance(config, BaseModel)
    name, settings = directory.name, flat_settings(config.model_dump(mode="json"))
    if baseline:
        name, settings = f"{directory.parents[1].name}, {baseline}", {**settings, "model.kind": baseline}
    return MlflowTarget(config.run.mlflow, config.run.name, name, settings)


@contextmanager
def tracked_baseline(config: TrackedJob, directory: Path, baseline: str, rank: int) -> Iterator[None]:
    """Keep the run of a baseline in the file store of its job; the run's own model is tracked with the job.

    Args:
        config: the job.
        directory: of the model's files.
        baseline: kind of the baseline; empty for the job's own model.
        rank: of this process.
    """
    with tracked(directory, mlflow_target(config, directory, baseline) if baseline and rank == 0 else None):
        yield


def write_metrics(directory: Path, document: Mapping[str, Any], step: int) -> None:
    """Write ``metrics.json`` of a model, and its metrics to its tracked run, if it has one.

    Args:
        directory: of the model's files.
        document: content of ``metrics.json``.
        step: number of optimizer steps.
    """
    write_json(directory / "metrics.json", document)
    values: dict[str, float] = {}
    for section, first in _SECTIONS.items():
        found: Any = document
        for part in section.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        values |= numbers(found, first)
    record_scalars(values, step)


def numbers(values: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield name and value of the numbers in a section, such as ``held_out/click/auc``."""
    if isinstance(values, Mapping):
        for key, inner in values.items():
            yield from numbers(inner, f"{name}/{key}")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, float(values)
