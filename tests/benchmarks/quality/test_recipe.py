"""The recipes: each is trained once and compared with its neighbour; the chosen one is the file configs/recipe.toml."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.measure import slug
from benchmarks.quality import kept_runs, recipe
from benchmarks.quality.attainable_bound import ATTAINABLE
from benchmarks.quality.recipe import CHOSEN, DEFAULT, HELD_OUT, LOGISTIC, RECIPE_JOB, RECIPES, TUNING, job_of
from benchmarks.quality.recipe_report import BEST
from trainer.config.ranker import JobConfig, load_config
from trainer.ranking.evaluation import Predictions

ROWS, USERS = 600, 40


def odds() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((ROWS, 2))


def predictions(noise: float, seed: int) -> Predictions:
    """Return predictions of two behaviours whose log-odds have an error; the second one is known of half the rows.

    The rows of each seed are in another order.
    """
    truth = odds()
    rng = np.random.default_rng(100 + seed)
    visit, user = np.arange(ROWS), np.random.default_rng(2).integers(0, USERS, ROWS)
    label = (np.random.default_rng(3).random((ROWS, 2)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    mask = np.stack([np.ones(ROWS), np.arange(ROWS) % 2], axis=1).astype(np.float32)
    probability = 1 / (1 + np.exp(-truth - noise * rng.standard_normal((ROWS, 2))))
    order = rng.permutation(ROWS)
    columns = (torch.from_numpy(values[order].astype(np.float32)) for values in (probability, label, mask))
    keys = (torch.from_numpy(values[order]) for values in (user, visit, np.zeros(ROWS, np.int64)))
    return Predictions(*keys, *columns)


def test_the_chosen_recipe_is_the_job_file() -> None:
    file = load_config(RECIPE_JOB)
    found = job_of(CHOSEN, HELD_OUT, 1, file.data.path)
    for section in ("features", "model", "alignment", "optimizer", "tables", "stream", "labels"):
        assert getattr(found, section) == getattr(file, section), section
    assert found.score == file.score == load_config(recipe.JOB).score
    assert found.train.model_copy(update={"device": "auto"}) == file.train
    assert found.data.model_copy(update={"workers": file.data.workers}) == file.data


def test_no_recipe_is_chosen_on_the_days_that_are_reported() -> None:
    tuning, held_out = (job_of(CHOSEN, days, 1, "world").data for days in (TUNING, HELD_OUT))
    assert tuning.eval_from < tuning.eval_until == held_out.eval_from
    # A training ends where its held-out range begins.
    assert not tuning.train_until and not held_out.train_until


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_job_that_differs_from_the_one_that_it_is_compared_with(name: str) -> None:
    than = RECIPES[name].than
    assert (than in RECIPES) == (name != DEFAULT)
    job = job_of(name, TUNING, 2, "world")
    assert job.data.eval_until == "2024-03-12" and job.run.seed == 2 and job.data.path == "world"
    assert name == DEFAULT or job != job_of(than, TUNING, 2, "world")


def test_trainings_are_kept_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noises = {DEFAULT: 2.0, LOGISTIC: 4.0, CHOSEN: 1.0}
    trained: list[tuple[str, str, int]] = []

    @contextmanager
    def train(config: JobConfig, world: Any) -> Iterator[Any]:
        by_job = {
            job_of(name, days, config.run.seed, "world").model_dump_json(): (name, days)
            for name in RECIPES
            for days in (TUNING, HELD_OUT)
        }
        # Overrides of all rankers are no part of a recipe.
        own = config.model_copy(update={"tables": job_of(DEFAULT, TUNING, 1, "world").tables})
        name, days = by_job[own.model_dump_json()]
        trained.append((name, days, config.run.seed))
        found = predictions(noises.get(name, 1.5), config.run.seed)
        features = SimpleNamespace(behaviours=("click", "gift"))
        yield SimpleNamespace(predict=lambda: found, features=features, rows=1000, seconds=2.0)

    monkeypatch.setattr(kept_runs, "trained_ranker", train)
    spec = SimpleNamespace(extra={"users": USERS, "days": 10, "seed": 1, "size": 3})
    monkeypatch.setattr(recipe.DatasetSpec, "load", lambda path: spec)
    dataset = ["first"]
    monkeypatch.setattr(kept_runs, "fingerprint", lambda path, spec: dataset[0])
    truth = 1 / (1 + np.exp(-odds()))
    monkeypatch.setattr(
        recipe, "bounds", lambda options, scores: {ATTAINABLE: 1 / (1 + np.exp(-odds() - 0.1)), BEST: truth}
    )
    out = tmp_path / "recipe.json"
    written: list[tuple[Path, JobConfig]] = []
    monkeypatch.setattr(recipe, "write_run", lambda directory, job, scores: written.append((directory, job)))
    arguments = ["--data", "world", "--work", str(tmp_path / "work"), "--out", str(out)]
    recipe.main([*arguments, "--seeds", "1", "--recipes", DEFAULT, CHOSEN, "batch 256"])
    assert trained == [
        *((name, TUNING, 1) for name in (DEFAULT, CHOSEN, "batch 256")),
        *((name, HELD_OUT, 1) for name in (DEFAULT, CHOSEN)),
    ]
    first = json.loads(out.read_text())
    # No line at the lower end of the gap yet.
    assert "gap_closed" not in first["held-out"]["behaviours"]["click"]["recipes"][CHOSEN]

    trained.clear()
    finals = [name for name in RECIPES if name in (DEFAULT, LOGISTIC, CHOSEN)]
    recipe.main([*arguments, "--seeds", "1", "2", "--recipes", *finals, "--days", HELD_OUT, "--runs", str(tmp_path)])
    assert written == [
        (tmp_path / slug(name) / f"seed-{seed}", job_of(name, HELD_OUT, seed, "world"))
        for name in finals
        for seed in (1, 2)
    ]
    assert trained == [(LOGISTIC, HELD_OUT, 1), *((name, HELD_OUT, 2) for name in finals)]
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["world"] == {"users": USERS, "days": 10, "seed": 1} and result["chosen"] == CHOSEN
    tuning, final = result["tuning"], result["held-out"]
    # The recipe that it changes has no training here.
    assert tuning["recipes"][CHOSEN]["to"] == DEFAULT and tuning["recipes"]["batch 256"]["to"] == DEFAULT
    assert final["recipes"][CHOSEN]["seeds"] == [1, 2] and final["recipes"][DEFAULT]["rows_per_second"][0] == 500
    click, gift = final["behaviours"]["click"], final["behaviours"]["gift"]
    assert click["rows"] == ROWS and gift["rows"] == ROWS // 2
    better = click["recipes"][CHOSEN]
    assert better["auc_difference"]["mean"] == pytest.approx(
        100 * (better["auc"][0] - click["recipes"][DEFAULT]["auc"][0])
    )
    assert better["auc_difference"]["low"] > 0 and better["gauc_difference"]["mean"] > 0
    assert len(better["auc_difference"]["seeds"]) == 2 and click["recipes"][DEFAULT]["auc_difference"]["mean"] is None
    shares = [click["recipes"][name]["gap_closed"][0] for name in (LOGISTIC, DEFAULT, CHOSEN)]
    assert shares[0] == pytest.approx(0) and shares == sorted(shares) and shares[-1] < 1
    assert click["above_attainable"] == [] and "held out days" in printed and "of the gap" in printed

    # Trainings of other settings, or of another dataset, are left out, and trained again where they are wanted.
    other = ["tables.learning_rate=0.5", *arguments, "--seeds", "1", "--days", HELD_OUT, "--recipes", DEFAULT]
    for change in ("settings", "dataset"):
        trained.clear()
        recipe.main(other)
        assert trained == [(DEFAULT, HELD_OUT, 1)], change
        left = json.loads(out.read_text())["held-out"]["recipes"]
        assert list(left) == [DEFAULT] and left[DEFAULT]["seeds"] == [1]
        assert "of other settings or data than those asked for; left out" in capsys.readouterr().err
        recipe.main(other)
        assert len(trained) == 1, "nothing twice"
        dataset[0] = "second"


def test_nothing_finished_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="limelight: error: no training of the recipe 'default' is finished yet"):
        recipe.main(["--data", "world", "--work", str(tmp_path), "--recipes"])
