"""Runs and exports work from every directory, after their dataset has moved, and on a machine without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.test_export import write_candidates
from tests.distributed.test_jobs import SETTINGS
from tests.nursery import Ended, Nursery
from tests.paths import ROOT
from tests.s3 import Bucket
from trainer.config.load import load_job
from trainer.config.paths import absolute, absolute_paths
from trainer.config.ranker import JobConfig
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.runtime.checksums import CHECKSUMS

At = Callable[..., Ended]


@pytest.fixture(scope="module")
def at(nursery: Nursery) -> At:
    """Return ``at(directory, *arguments, expect=0, **environment)``: the command, as typed in a directory."""

    def run(directory: Path, *arguments: object, expect: int = 0, **environment: str) -> Ended:
        ended = nursery.run("launch.cli.main", arguments, directory=directory, environment=environment)
        assert ended.status == expect, ended.stdout[-2000:] + ended.stderr[-4000:]
        return ended

    return run


@pytest.fixture(scope="module")
def home(at: At, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with ``world``, ``candidates.parquet``, and a run of a job typed in ``project`` beside it."""
    home = tmp_path_factory.mktemp("moved")
    (home / "project").mkdir()
    (home / "elsewhere").mkdir()
    at(home, "data", "simulate", "world", "--users", 50, "--days", 3, "--partitions", 2, "--seed", 5)
    write_candidates(home / "world", home / "candidates.parquet")
    settings = [str(ROOT / SETTINGS[0]), *SETTINGS[1:], "data.workers=0"]
    at(home / "project", "train", *settings, "data.path=../world", "run.directory=runs/first")
    return home


@pytest.fixture(scope="module")
def scores(at: At, home: Path) -> pa.Table:
    """Return the scores of the run, computed where it was trained."""
    at(home / "project", "score", "runs/first", "../candidates.parquet", "../scores.parquet")
    return pq.read_table(home / "scores.parquet")


def one_line(ended: Ended) -> str:
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("limelight: error: "), ended.stderr
    return lines[0]


def stored_paths(document: Any) -> list[str]:
    """Return every text of a JSON document that is a path below the directories of the test, or leads out of one."""
    if isinstance(document, dict):
        return [found for value in document.values() for found in stored_paths(value)]
    if isinstance(document, list):
        return [found for value in document for found in stored_paths(value)]
    return [document] if isinstance(document, str) and ("world" in document or "runs/" in document) else []


def test_every_stored_path_is_absolute(home: Path) -> None:
    run = home / "project" / "runs" / "first"
    world = str(home / "world")
    config = json.loads((run / "config.json").read_text())
    assert (config["data"]["path"], config["run"]["directory"]) == (world, str(run))
    assert json.loads((run / "environment.json").read_text())["starts"][0]["dataset"]["path"] == world
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    for file in checkpoint.glob("*.json"):
        found = stored_paths(json.loads(file.read_text()))
        assert [path for path in found if not path.startswith("/")] == [], file


def test_a_run_is_used_from_another_directory(at: At, home: Path, scores: pa.Table) -> None:
    run, elsewhere = home / "project" / "runs" / "first", home / "elsewhere"
    at(elsewhere, "score", run, home / "candidates.parquet", "scores.parquet")
    assert pq.read_table(elsewhere / "scores.parquet").equals(scores)
    evaluated = json.loads(at(elsewhere, "evaluate", run, "--json").stdout)["behaviours"]["click"]
    first = json.loads((run / "metrics.json").read_text())["behaviours"]["click"]
    assert evaluated["rows"] == first["rows"] and evaluated["auc"] == pytest.approx(first["auc"], rel=1e-4)
    at(elsewhere, "checkpoint", "show", run)
    at(elsewhere, "checkpoint", "verify", "../project/runs/first")
    # The same command again finds the finished run, from the directory in which it was typed.
    settings = [str(ROOT / SETTINGS[0]), *SETTINGS[1:], "data.workers=0"]
    at(home / "project", "train", *settings, "data.path=../world", "run.directory=runs/first")


def test_data_replaces_the_path_of_a_dataset_that_moved(at: At, home: Path, scores: pa.Table, tmp_path: Path) -> None:
    run, world, moved = home / "project" / "runs" / "first", home / "world", tmp_path / "moved"
    at(tmp_path, "export", run, "model")
    rows = read_rows(world, DatasetSpec.load(world))
    user, item = int(rows["user_id"][-1]), int(rows["item_id"][-1])
    explain = ["explain", run, "--user", user, "--candidate", item, "--out", tmp_path / "explained.png"]
    verbs: list[list[object]] = [
        ["score", run, home / "candidates.parquet", "of_run.parquet"],
        ["score", "model", home / "candidates.parquet", "of_export.parquet"],
        ["evaluate", run],
        explain,
        ["export", run, "carrying", "--with-dataset"],
    ]
    world.rename(moved)
    try:
        lines = [one_line(at(tmp_path, *verb, expect=2)) for verb in verbs]
        assert [line for line in lines if f"{world}: no dataset here, and " not in line] == []
        assert [line for line in lines if "with --data PATH" not in line] == []
        assert "history/ and rows/), or repeat `limelight export` with --with-dataset" in lines[1]
        for verb in verbs:
            at(tmp_path, *verb, "--data", "moved")
    finally:
        moved.rename(world)
    assert pq.read_table(tmp_path / "of_run.parquet").equals(scores)
    of_export = pq.read_table(tmp_path / "of_export.parquet")
    for name in scores.column_names:
        assert of_export[name].to_pylist() == pytest.approx(scores[name].to_pylist(), abs=1e-6)
    assert json.loads((tmp_path / "carrying" / "config.json").read_text())["data"]["path"] == str(moved)


def test_an_export_that_carries_its_dataset_scores_alone(at: At, home: Path, scores: pa.Table, tmp_path: Path) -> None:
    run, world = home / "project" / "runs" / "first", home / "world"
    at(home / "project", "export", "runs/first", tmp_path / "model", "--with-dataset")
    (tmp_path / "machine").mkdir()
    shutil.move(tmp_path / "model", tmp_path / "machine" / "copied")
    carried = tmp_path / "machine" / "copied" / "dataset"
    assert {path.name for path in carried.iterdir()} == {
        *("dataset.json", "checksums.json", "history", "rows"),
        *("users.parquet", "authors.parquet", "items.parquet"),
    }
    world.rename(home / "away")
    try:
        at(tmp_path / "machine", "score", "copied", home / "candidates.parquet", "scores.parquet")
    finally:
        (home / "away").rename(world)
    scored = pq.read_table(tmp_path / "machine" / "scores.parquet")
    for name in scores.column_names:
        assert scored[name].to_pylist() == pytest.approx(scores[name].to_pylist(), abs=1e-6)
    assert run.is_dir()


def test_a_run_of_an_earlier_version_opens_where_it_was_trained(
    at: At, home: Path, scores: pa.Table, tmp_path: Path
) -> None:
    run = home / "project" / "old"
    shutil.copytree(home / "project" / "runs" / "first", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = "../world"
    (run / "config.json").write_text(json.dumps(config))
    (run / CHECKSUMS).unlink()
    at(home / "project", "score", "old", "../candidates.parquet", tmp_path / "scores.parquet")
    assert pq.read_table(tmp_path / "scores.parquet").equals(scores)
    line = one_line(at(tmp_path, "evaluate", run, expect=2))
    assert line == (
        f"limelight: error: ../world: no dataset here, and {run} was trained on it; an earlier version stored this "
        "relative path as it was typed; name its present place with --data PATH"
    )
    at(tmp_path, "evaluate", run, "--data", home / "world")


def test_results_of_a_model_go_to_an_object_store(
    at: At, home: Path, scores: pa.Table, bucket: Bucket, tmp_path: Path
) -> None:
    run, world = home / "project" / "runs" / "first", home / "world"
    rows = read_rows(world, DatasetSpec.load(world))
    user, item = int(rows["user_id"][-1]), int(rows["item_id"][-1])
    printed = ""
    for arguments in (
        ["score", run, home / "candidates.parquet", f"{bucket.url}/scores.parquet"],
        ["evaluate", run, "--predictions", f"{bucket.url}/predictions.parquet"],
        ["explain", run, "--user", user, "--candidate", item, "--out", f"{bucket.url}/explained.png"],
        ["export", run, f"{bucket.url}/model", "--with-dataset"],
    ):
        printed += at(tmp_path, *arguments, **bucket.environment).stdout
    assert f"candidates scored: {bucket.url}/scores.parquet" in printed
    assert f"picture: {bucket.url}/explained.png" in printed
    assert list(tmp_path.iterdir()) == []
    names = bucket.names()
    assert {"scores.parquet", "predictions.parquet", "explained.png", "model/export.json"} <= set(names)
    assert bucket.read("explained.png").startswith(b"\x89PNG")
    (tmp_path / "scores.parquet").write_bytes(bucket.read("scores.parquet"))
    assert pq.read_table(tmp_path / "scores.parquet").equals(scores)
    bucket.filesystem.get(f"{bucket.url}/model", str(tmp_path / "model"), recursive=True)
    at(tmp_path, "score", "model", home / "candidates.parquet", "again.parquet")
    no_bucket = "s3://no-such-bucket/scores.parquet"
    score = ["score", run, home / "candidates.parquet", no_bucket]
    line = one_line(at(tmp_path, *score, expect=2, **bucket.environment))
    assert line.startswith(f"limelight: error: {no_bucket}: cannot be written (") and "bucket does not exist" in line


def test_paths_of_a_job_become_absolute_and_hub_ids_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "world").mkdir()
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs/simulated.toml"
    for given, stored in {
        "world": str(tmp_path / "world"),
        "./world/../world": str(tmp_path / "world"),
        "s3://bucket/world": "s3://bucket/world",
        "missing": "missing",
    }.items():
        job = load_job(JobConfig, file, [f"data.path={given}", "run.directory=runs/new"])
        assert absolute_paths(job).data.path == stored
        assert absolute_paths(job).run.directory == str(tmp_path / "runs" / "new")
    assert absolute("Qwen/Qwen2-7B") == "Qwen/Qwen2-7B" and absolute("") == ""
