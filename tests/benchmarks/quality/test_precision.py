"""The benchmark of precision: rankers that differ in their arithmetic only, and intervals over users and seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import precision
from benchmarks.quality.kept_runs import run_file
from benchmarks.quality.larm_report import Scores
from benchmarks.quality.precision import DEFAULT, HALF, LOGS, OPERATIONS, SIMULATED, VARIANTS, job_of, main, tables
from trainer.config.precision import dense_settings

SMALL = ["model.expert_layers=[[4]]", "model.tower=[4]", "model.attention=[4]", "train.batch_size=64"]


@pytest.mark.parametrize("log", LOGS)
def test_rankers_differ_in_their_arithmetic_only(log: str) -> None:
    jobs = {name: job_of(name, log, 2, Path("data")) for name in VARIANTS}
    first = jobs[DEFAULT]
    for name, job in jobs.items():
        model = {key: getattr(first.model, key) for key in ("compiled_attention", "compiled_experts")}
        same = {"model": job.model.model_copy(update=model)}
        same["train"] = job.train.model_copy(update={"precision": first.train.precision})
        assert job.model_copy(update=same) == first and job.run.seed == 2, name
    enabled = {name: "bf16" in dense_settings(job.train) for name, job in jobs.items()}
    assert enabled == {DEFAULT: False, HALF: True, OPERATIONS: False}
    assert not jobs[OPERATIONS].model.compiled_attention and jobs[HALF].model.compiled_attention


@pytest.mark.parametrize("log", LOGS)
def test_the_days_are_before_those_that_are_reported_elsewhere(log: str) -> None:
    found = job_of(DEFAULT, log, 1, Path("data")).data
    reported = precision.load_config(LOGS[log].job).data
    assert found.eval_from < found.eval_until <= reported.eval_from and not found.train_until


def test_main_trains_once_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "precision.json", tmp_path / "work"
    arguments = [*SMALL, "--work", str(work), "--out", str(out), "--users", "30", "--seeds", "1", "2"]
    main(arguments)
    printed = capsys.readouterr()
    assert printed.err.count(f"{SIMULATED}, ") == 2 * len(VARIANTS)
    result: dict[str, Any] = json.loads(out.read_text())
    assert list(result["logs"]) == [SIMULATED] and tables(result) in printed.out
    found = result["logs"][SIMULATED]["behaviours"]["click"]
    for name in (HALF, OPERATIONS):
        line = found["recipes"][name]
        one, other = line["auc_difference"]["seeds"]
        assert line["auc_over_seeds"][0] == pytest.approx(line["auc_difference"]["mean"]) == (one + other) / 2
        # Student's t with one degree of freedom.
        assert line["auc_over_seeds"][1] == pytest.approx(12.706 * abs(one - other) / 2, rel=1e-3)
        assert line["auc_difference"]["low"] <= line["auc_difference"]["mean"] <= line["auc_difference"]["high"]
    scores = {
        (seed, name): Scores.read(run_file(work / SIMULATED, seed, name).with_suffix(".npz")).probability
        for seed in (1, 2)
        for name in VARIANTS
    }
    # Six trainings, of which no two are the same.
    assert len({probability.tobytes() for probability in scores.values()}) == len(scores) == 6
    assert found["seed_deviation"]["auc"] == pytest.approx(
        100 * found["recipes"][DEFAULT]["auc"][1] * math.sqrt(2) / 12.706, rel=1e-3
    )
    main(arguments)
    assert not capsys.readouterr().err
