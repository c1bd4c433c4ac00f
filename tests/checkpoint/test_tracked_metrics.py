"""Settings and metrics of models and baselines in an MLflow file store."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.runtime.recorded_mlflow import RecordedRun
from trainer.checkpoint.tracked_metrics import mlflow_target, tracked_baseline, write_metrics
from trainer.config.ranker import parse_config
from trainer.runtime.tracking import tracked


def test_the_last_metrics_of_models_and_baselines_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    settings: dict[str, Any] = {"data": {"path": "d"}, "run": {"name": "small", "mlflow": str(tmp_path / "store")}}
    config = parse_config(settings, "test")
    baseline = tmp_path / "run" / "baselines" / "mmoe"
    baseline.mkdir(parents=True)
    document = {
        "behaviours": {"click": {"auc": 0.75, "gauc": None}},
        "stream": {"progressive": {"click": {"auc": 0.5}}, "users": None},
        "training": {"rows": 3},
    }
    for directory, kind in ((tmp_path / "run", ""), (baseline, "mmoe")):
        with tracked(directory, mlflow_target(config, directory, kind)):
            write_metrics(directory, document, 7)
        assert json.loads((directory / "metrics.json").read_text()) == document
    assert {(run.target.experiment, run.target.name) for run in runs} == {("small", "run"), ("small", "run, mmoe")}
    assert [run.scalars for run in runs] == [[("held_out/click/auc", 0.75, 7), ("stream/click/auc", 0.5, 7)]] * 2
    assert [run.ends for run in runs] == [[("finished", "")]] * 2
    assert [run.target.settings["model.kind"] for run in runs] == ["ple", "mmoe"]
    assert runs[0].target.settings["run.name"] == "small" and runs[0].target.store == str(tmp_path / "store")


def test_a_job_without_a_store_writes_its_metrics_alone(tmp_path: Path) -> None:
    config = parse_config({"data": {"path": "d"}}, "test")
    assert mlflow_target(config, tmp_path) is None
    write_metrics(tmp_path, {"behaviours": {}}, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_the_name_of_a_directory_makes_no_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    config = parse_config({"data": {"path": "d"}, "run": {"mlflow": "store"}}, "test")
    directory = tmp_path / "baselines" / "din-1"
    target = mlflow_target(config, directory)
    assert target is not None and (target.name, target.settings["model.kind"]) == ("din-1", "ple")
    with tracked_baseline(config, directory, "", 0):
        assert runs == []
    with tracked_baseline(config, directory, "mmoe", 1):
        assert runs == []
    with tracked_baseline(config, directory, "mmoe", 0):
        assert len(runs) == 1


def test_every_job_hands_its_run_to_the_store() -> None:
    calls = [
        (path.name, {word.arg for word in node.keywords})
        for path in sorted((ROOT / "trainer").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_directory"
    ]
    assert len(calls) == 9 and [name for name, words in calls if "mlflow" not in words] == []
