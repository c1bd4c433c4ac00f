"""Records of a model in an MLflow file store, where the job asks for one with ``run.mlflow``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.align import EngineJob
from trainer.config.diff import flat_settings
from trainer.runtime.files import write_json
from trainer.runtime.mlflow_store import MlflowTarget, write_last_metrics

_SECTIONS = {"behaviours": "held_out", "retrieval": "retrieval"}
"""Section of ``metrics.json`` -> first part of the names of its metrics."""


def mlflow_target(config: EngineJob, model_dir: Path) -> MlflowTarget | None:
    """Return the place of a model in the file store of its job; None without one.

    Args:
        config: the job; its runs of one name are an experiment.
        model_dir: directory of the model's files, which names its run: that of the job, or of a baseline.
    """
    if not config.run.mlflow:
        return None
    name, settings = model_dir.name, flat_settings(config.model_dump(mode="json"))
    if model_dir.parent.name == "baselines":
        name, settings = f"{model_dir.parents[1].name}, {model_dir.name}", {**settings, "model.kind": model_dir.name}
    return MlflowTarget(config.run.mlflow, config.run.name, name, settings)


def write_metrics(config: EngineJob, model_dir: Path, document: Mapping[str, Any], step: int) -> None:
    """Write ``metrics.json`` of a model, after its metrics are in the file store of the job, if it has one.

    Args:
        config: the job.
        model_dir: directory of the model's files.
        document: content of ``metrics.json``.
        step: number of optimizer steps.

    Raises:
        UserError: the file store cannot be written, or MLflow is not installed.
    """
    if (target := mlflow_target(config, model_dir)) is not None:
        metrics = dict(value for key, first in _SECTIONS.items() for value in _numbers(document.get(key), first))
        write_last_metrics(model_dir, target, metrics, step)
    # Last, since a model with this file is never trained again.
    write_json(model_dir / "metrics.json", document)


def _numbers(values: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield name and value of the numbers in a section, such as ``held_out/click/auc``."""
    if isinstance(values, Mapping):
        for key, inner in values.items():
            yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(values, int | float):
        yield name, float(values)
