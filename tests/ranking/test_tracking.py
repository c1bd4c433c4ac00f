"""Tests of the metrics of models and baselines in an MLflow file store, with the real package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_mlflow_store import open_store
from trainer.config.ranker import parse_config
from trainer.ranking.tracking import mlflow_target, write_metrics


def test_the_last_metrics_of_models_and_baselines_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = open_store(tmp_path / "store", monkeypatch)
    settings: dict[str, Any] = {"data": {"path": "d"}, "run": {"name": "small", "mlflow": str(tmp_path / "store")}}
    config = parse_config(settings, "test")
    baseline = tmp_path / "run" / "baselines" / "mmoe"
    baseline.mkdir(parents=True)
    document = {"behaviours": {"click": {"auc": 0.75, "gauc": None}}, "training": {"rows": 3}}
    for directory in (tmp_path / "run", baseline):
        write_metrics(config, directory, document, 7)
        assert json.loads((directory / "metrics.json").read_text()) == document
    (experiment,) = [found for found in client.search_experiments() if found.name == "small"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {"run", "run, mmoe"}
    assert [run.data.metrics for run in runs] == [{"held_out/click/auc": 0.75}] * 2
    kinds = {run.info.run_name: run.data.params["model.kind"] for run in runs}
    assert kinds == {"run": "ple", "run, mmoe": "mmoe"}


def test_a_job_without_a_store_writes_its_metrics_alone(tmp_path: Path) -> None:
    config = parse_config({"data": {"path": "d"}}, "test")
    assert mlflow_target(config, tmp_path) is None
    write_metrics(config, tmp_path, {"behaviours": {}}, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
