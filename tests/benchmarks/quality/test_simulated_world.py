"""The benchmark of the simulated world runs, and its summary is arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import simulated_world


def seed(ple: float, logistic: float) -> dict[str, dict[str, Any]]:
    aucs = dict.fromkeys(simulated_world.MODELS, 0.7) | {"ple": ple, "logistic": logistic}
    return {
        name: {"click": {"auc": auc, "gauc": auc - 0.1, "best_auc": 0.9, "positives": 5}} for name, auc in aucs.items()
    }


def test_the_summary_has_means_intervals_and_shares_of_the_gap() -> None:
    summary = simulated_world.summarise([seed(0.74, 0.60), seed(0.76, 0.60)])["click"]
    ple = summary["models"]["ple"]
    assert ple["auc"] == pytest.approx(0.75) and ple["gauc"] == pytest.approx(0.65)
    # Student's t with one degree of freedom: 12.706 times the standard error.
    assert ple["half_width_95"] == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert ple["gap_closed"] == pytest.approx(0.5)
    assert simulated_world.summarise([seed(0.74, 0.60)])["click"]["models"]["ple"]["half_width_95"] is None
    assert "| click | 5 |" in simulated_world.table({"click": summary})


def test_main_trains_each_seed_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*arguments: object) -> None:
        words = tuple(map(str, arguments))
        commands.append(words)
        if words[0] == "train":
            run_directory = Path(next(word for word in words if word.startswith("run.directory")).split("=")[1])
            for name, metrics in seed(0.74, 0.6).items():
                directory = run_directory if name == "ple" else run_directory / "baselines" / name
                directory.mkdir(parents=True)
                (directory / "metrics.json").write_text(json.dumps({"behaviours": metrics}))

    monkeypatch.setattr(simulated_world, "run_limelight", run)
    out = tmp_path / "results" / "simulated_world.json"
    simulated_world.main(["--seeds=2", "--users=30", "--days=4", "--ranks=1", f"--out={out}", "train.epochs=3"])
    assert [words[:2] for words in commands] == [("data", "simulate"), *[("train", simulated_world.JOB)] * 2]
    assert commands[0][3:7] == ("--users", "30", "--days", "4")
    assert "train.epochs=3" in commands[1] and "--ranks=1" in commands[1] and "run.seed=2" in commands[2]
    written = json.loads(out.read_text())
    assert written["seeds"] == 2 and written["result"]["click"]["models"]["ple"]["half_width_95"] == 0
    assert "best possible" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "simulated_world.json"
    small = ["data.eval_from=2024-03-06", "train.batch_size=256", "model.expert_layers=[[8], [8]]", "model.tower=[4]"]
    simulated_world.main(["--seeds=1", "--users=60", "--days=3", "--ranks=1", f"--out={out}", *small])
    click = json.loads(out.read_text())["result"]["click"]
    assert click["positives"] > 0 and set(click["models"]) == set(simulated_world.MODELS)
    assert all(0.2 < model["auc"] < click["best_auc"] <= 1 for model in click["models"].values())
