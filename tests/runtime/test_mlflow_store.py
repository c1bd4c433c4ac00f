"""Runs in an MLflow file store, with the real package."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.console.errors import UserError
from trainer.runtime import mlflow_store
from trainer.runtime.mlflow_names import StoreNames
from trainer.runtime.mlflow_store import REASON, MlflowRun, MlflowTarget
from trainer.runtime.scalars import open_scalars
from trainer.runtime.tracking import tracked


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow-skinny, of the extra mlflow")
    return mlflow.MlflowClient((tmp_path / "store").as_uri())


NAMES = [
    "",
    "qa/",
    "./x",
    "a/../b",
    "q" * 260,
    "任" * 100,
    "w" * 240 + "/" + "z" * 200,
    "x",
    "x/y",
    "点击",
    "评论",
    "<>",
    "><",
]


def target(tmp_path: Path, **settings: Any) -> MlflowTarget:
    return MlflowTarget(str(tmp_path / "store"), "small", "run", settings)


def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir(exist_ok=True)
    return tmp_path / "run"


def only_run(client: Any) -> Any:
    (experiment,) = [found for found in client.search_experiments() if found.name == "small"]
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.mark.parametrize("at_once", [2, 500])
def test_a_run_has_settings_scalars_and_a_name(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(mlflow_store, "_AT_ONCE", at_once)
    many = {f"data.key {number}": number for number in range(120)}
    directory = model_dir(tmp_path)
    with tracked(directory, target(tmp_path, **{"train.weights": {"é": 1}, **many})):
        writer = open_scalars(directory / "tensorboard", 0)
        for step in range(3):
            writer.add_scalar("progressive_auc/click", step / 2, step)
            writer.add_scalar("loss<é>", math.nan, step)
        writer.add_scalar("loss<é>", 4.0, 3)
        writer.close()
        assert only_run(client).info.status == "RUNNING"
    run = only_run(client)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.metrics == {"progressive_auc/click": 1.0, StoreNames().of("loss<é>"): 4.0}
    assert run.data.params["data.key 119"] == "119" and len(run.data.params) == 121
    assert run.data.tags["limelight.directory"] == str(directory)
    history = client.get_metric_history(run.info.run_id, "progressive_auc/click")
    assert [(one.step, one.value) for one in history] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert list((directory / "tensorboard").iterdir()), "TensorBoard's files are there, too"


def test_a_job_that_is_continued_continues_its_run(tmp_path: Path, client: Any) -> None:
    directory = model_dir(tmp_path)
    for step in (1, 2):
        run = MlflowRun(directory, target(tmp_path))
        run.add_scalar("loss", float(step), step)
        run.close()
        assert only_run(client).info.status == "RUNNING" and REASON not in only_run(client).data.tags
        run.end("stopped", "SIGTERM")
        assert only_run(client).info.status == "KILLED" and only_run(client).data.tags[REASON] == "SIGTERM"
    found = only_run(client)
    assert [one.step for one in client.get_metric_history(found.info.run_id, "loss")] == [1, 2]
    # A run that is gone is made again.
    client.delete_run(found.info.run_id)
    (directory / "mlflow.json").write_text(json.dumps({"store": str(tmp_path / "store"), "run_id": "0" * 32}))
    MlflowRun(directory, target(tmp_path)).close()
    assert only_run(client).info.run_id != found.info.run_id


def test_every_name_is_accepted_and_none_is_another(tmp_path: Path, client: Any) -> None:
    settings = {f"train.weights.{name}": value for value, name in enumerate(NAMES)}
    for start in range(2):
        run = MlflowRun(model_dir(tmp_path), target(tmp_path, **settings))
        for value, name in enumerate(NAMES):
            run.add_scalar(f"evaluation/{name}", float(value), start)
        run.end("finished")
    data = only_run(client).data
    assert sorted(data.metrics.values()) == list(range(len(NAMES))), (
        "a start after the first one finds its curves again"
    )
    assert sorted(map(int, data.params.values())) == list(range(len(NAMES)))
    assert data.metrics["evaluation/点击"] == NAMES.index("点击") and "train.weights.评论" in data.params


def test_a_damaged_store_is_one_line(tmp_path: Path, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    MlflowRun(model_dir(tmp_path), target(tmp_path)).end("finished")
    info = only_run(client).info
    experiment = tmp_path / "store" / info.experiment_id / "meta.yaml"
    for file in (experiment, tmp_path / "store" / info.experiment_id / info.run_id / "meta.yaml"):
        whole = file.read_text()
        for content in ("", "{: [", "\0", "- 1\n"):
            file.write_text(content)
            caplog.clear()
            for other in (False, True):
                # A new run looks at each experiment.
                place = model_dir(tmp_path) if not other else tmp_path / "other"
                try:
                    MlflowRun(place, replace(target(tmp_path), experiment="other" if other else "small"))
                except UserError as error:
                    assert "damaged or cannot be written" in str(error) and "\n" not in str(error)
            assert all(record.exc_info is None for record in caplog.records)
        file.write_text(whole)
        (tmp_path / "run" / "mlflow.json").write_text(
            json.dumps({"store": str(tmp_path / "store"), "run_id": info.run_id})
        )
    experiment.write_text("- 1\n")
    with pytest.raises(UserError, match="damaged or cannot be written"):
        MlflowRun(tmp_path / "third", target(tmp_path))


def test_a_run_that_cannot_be_opened_is_not_made_twice(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "no space left")

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(UserError, match="no space left"):
            patched.setattr(type(client), "log_batch", refuse)
            MlflowRun(model_dir(tmp_path), target(tmp_path, rate=0.5))
        assert only_run(client).info.status == "FAILED"
    MlflowRun(model_dir(tmp_path), target(tmp_path, rate=0.5)).close()
    assert only_run(client).info.status == "RUNNING" and only_run(client).data.params == {"rate": "0.5"}


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path, client: Any) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match=r"run\.mlflow = '.*/file/store': damaged or cannot be written") as caught:
        MlflowRun(model_dir(tmp_path), replace(target(tmp_path), store=str(tmp_path / "file/store")))
    assert "\n" not in str(caught.value)


def test_without_the_package_the_key_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(UserError, match=r"run\.mlflow = '.*/store': needs the package mlflow-skinny"):
        MlflowRun(model_dir(tmp_path), target(tmp_path))
    assert not (tmp_path / "store").exists()
