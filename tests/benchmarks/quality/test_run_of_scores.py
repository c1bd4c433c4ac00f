"""Kept predictions become a run that another benchmark reads: its rows, their times and its job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.quality.gap import read_gap
from benchmarks.quality.kept_runs import select
from benchmarks.quality.larm_report import Scores
from benchmarks.quality.run_of_scores import write_run
from trainer.checkpoint.run_directory import load_run
from trainer.config.ranker import JobConfig, load_config
from trainer.console.errors import UserError
from trainer.data.simulator.write_dataset import simulate

BEHAVIOURS = ("click", "gift")


def job_on(world: Path) -> JobConfig:
    return load_config("configs/simulated.toml", [f"data.path={world}", "data.eval_from=2024-03-05", "run.seed=7"])


def scores_of(world: Path) -> tuple[Scores, np.ndarray]:
    """Return random predictions of all visits to rooms of a world, in no order, and the times of their requests."""
    events = pa.concat_tables(map(pq.read_table, sorted((world / "events").glob("*.parquet"))))
    shown = events.filter(pc.and_(pc.equal(events["domain"], 1), pc.equal(events["event"], "exposure")))
    random = np.random.default_rng(1)
    order = random.permutation(len(shown))
    user, visit, time = (shown[name].to_numpy()[order] for name in ("user_id", "visit_id", "time_ms"))
    probability = random.random((len(shown), 2), dtype=np.float32)
    label, mask = random.integers(0, 2, (2, len(shown), 2)).astype(np.float32)
    return Scores(BEHAVIOURS, user, visit, probability, label, mask, 1.0), time


def test_a_kept_training_is_a_run_with_its_rows_and_job(tmp_path: Path) -> None:
    world = tmp_path / "world"
    simulate(world, 30, 2, 2, 1, factors=True)
    scores, time = scores_of(world)
    job = job_on(world)
    for seed in (1, 2):
        write_run(tmp_path / f"seed-{seed}", job, scores)
    found = load_run(str(tmp_path / "seed-1"))
    assert (found.data, found.features, found.model, found.run.seed) == (job.data, job.features, job.model, 7)
    gap = read_gap([str(tmp_path / "seed-1"), str(tmp_path / "seed-2")], None, None)
    order = np.argsort(scores.visit_id)
    expected = select(scores, order)
    for rows in gap.runs:
        assert rows.behaviours == BEHAVIOURS
        np.testing.assert_array_equal(rows.request_ms, time[order])
        for name in ("user_id", "visit_id", "probability", "label", "mask"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))


def test_a_world_without_factors_is_refused(tmp_path: Path) -> None:
    world = tmp_path / "world"
    simulate(world, 10, 1, 1, 1)
    with pytest.raises(UserError, match="has no factors; make it with limelight data simulate --factors"):
        write_run(tmp_path / "run", job_on(world), scores_of(world)[0])
    assert not (tmp_path / "run").exists()
