"""Resuming and scoring of runs that an earlier version wrote; ``tests/checkpoint/stored/README.md`` describes them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from peft import AutoPeftModelForCausalLM

from tests.nursery import Nursery
from tests.paths import ROOT
from trainer.checkpoint.manifest import list_checkpoints

STORED = ROOT / "tests/checkpoint/stored/runs_0.1.tar.xz"

SAME = {"rel": 2e-3, "abs": 2e-3}
"""Tolerance for the rounding of other processors; a lost or repeated row changes the metrics by far more."""


FINETUNE = """
[run]
directory = "finetune"
[data]
train = ["samples/train.jsonl"]
evaluate = ["samples/eval.jsonl"]
length = 64
[small]
vocabulary = 300
hidden = 16
layers = 1
heads = 2
[lora]
rank = 4
modules_to_save = ["lm_head"]
[optimizer]
learning_rate = 2e-3
[train]
batch_size = 8
epochs = 4
deepspeed = "samples/zero2.json"
log_every = 1
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract the stored runs, and return the directory that their relative paths start from."""
    directory = tmp_path_factory.mktemp("earlier")
    with tarfile.open(STORED) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def command(nursery: Nursery, earlier: Path) -> Callable[..., str]:
    """Run a command beside the stored runs; returns what it printed."""

    def run(*arguments: str) -> str:
        ended = nursery.run("launch.cli.main", arguments, directory=earlier)
        assert ended.status == 0, ended.stderr[-3000:]
        return ended.stdout

    return run


@pytest.mark.parametrize("run", ["batch", "stream"])
def test_a_rankers_run_is_resumed_to_the_same_end(command: Callable[..., str], earlier: Path, run: str) -> None:
    (stopped,) = list_checkpoints(earlier / run / "checkpoints")
    printed = command("train", f"{run}.toml")
    assert f"from {run}/checkpoints/{stopped.name}" in printed
    then = json.loads((earlier / "expected" / f"{run}_metrics.json").read_text())
    now = json.loads((earlier / run / "metrics.json").read_text())
    metrics = ("behaviours",) if run == "batch" else ("stream", "progressive")
    for name in metrics:
        then, now = then[name], now[name]
    assert then.keys() == now.keys() == {"click", "gift"}
    for behaviour in then:
        assert now[behaviour]["rows"] == then[behaviour]["rows"]
        assert now[behaviour]["positives"] == then[behaviour]["positives"]
        for name in ("logloss", "calibration"):
            assert now[behaviour][name] == pytest.approx(then[behaviour][name], **SAME), f"{behaviour} {name}"


def test_a_fine_tuning_run_is_resumed(command: Callable[..., str], earlier: Path) -> None:
    (stopped,) = list_checkpoints(earlier / "finetune" / "checkpoints")
    (earlier / "finetune.toml").write_text(FINETUNE)
    printed = command("finetune", "finetune.toml")
    assert f"from finetune/checkpoints/{stopped.name}" in printed
    assert json.loads((earlier / "finetune" / "metrics.json").read_text())
    # peft finds the base model from here, another directory than that of the command.
    adapted = AutoPeftModelForCausalLM.from_pretrained(earlier / "finetune" / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(earlier / "finetune" / "base")


def test_a_staytime_run_of_another_directory_names_data(
    nursery: Nursery, earlier: Path, tmp_path: Path, command: Callable[..., str]
) -> None:
    arguments = ["score", str(earlier / "staytime"), "out.parquet"]
    ended = nursery.run("launch.cli.main", arguments, directory=tmp_path)
    stored = json.loads((earlier / "staytime" / "config.json").read_text())["data"]["path"]
    assert ended.status == 2 and f"error: {stored}: no dataset here" in ended.stderr and "--data PATH" in ended.stderr
    assert "an earlier version stored this relative path" in ended.stderr and len(ended.stderr.splitlines()) == 1
    ended = nursery.run("launch.cli.main", [*arguments, "--data", str(earlier / stored)], directory=tmp_path)
    assert ended.status == 0, ended.stderr[-3000:]
    same_table(tmp_path / "out.parquet", earlier / "expected" / "staytime_scores.parquet")


def test_an_export_and_a_staytime_run_score_as_before(command: Callable[..., str], earlier: Path) -> None:
    command("score", "export", "candidates.parquet", "now.parquet")
    same_table(earlier / "now.parquet", earlier / "expected" / "scores_export.parquet")
    command("score", "staytime", "staytime_now.parquet")
    same_table(earlier / "staytime_now.parquet", earlier / "expected" / "staytime_scores.parquet")


def same_table(now: Path, then: Path) -> None:
    """Assert that two files have the same columns and rows, with numbers equal up to rounding."""
    ours, theirs = pq.read_table(now), pq.read_table(then)
    assert ours.column_names == theirs.column_names
    for name in ours.column_names:
        np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-4, atol=1e-6)
