"""The benchmark of KuaiRand compares models on the same rows, paired by user."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import kuairand
from trainer.config.ranker import load_config
from trainer.data.features.dense_inputs import DenseInputs
from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking.setup import split_in_time


def test_without_data_it_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMELIGHT_KUAIRAND", raising=False)
    with pytest.raises(SystemExit, match="--data or --source"):
        kuairand.main([])


def test_differences_are_paired_and_means_are_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuairand, "RESAMPLES", 50)
    random = np.random.default_rng(0)
    n = 400
    labels = (random.random((n, len(kuairand.BEHAVIOURS))) < 0.4).astype(np.uint8)
    spec = DatasetSpec(
        name="rows",
        source="random numbers",
        licence="none",
        partitions=1,
        timezone="UTC",
        behaviours=kuairand.BEHAVIOURS,
        applies={name: ("video",) for name in kuairand.BEHAVIOURS},
        candidates=("video",),
    )

    def scores(noise: float) -> dict[str, np.ndarray]:
        drawn = random.standard_normal(labels.shape) * noise + labels
        return {name: drawn[:, k] for k, name in enumerate(kuairand.BEHAVIOURS)}

    ple = [scores(0.5), scores(0.6)]
    models = {"ple": ple, "lightgbm-own": [scores(3.0)], "lightgbm-all": [ple[0]]}
    result = kuairand.compare(models, {"user_id": random.integers(0, 20, n), "label": labels}, spec)
    click = result["click"]
    assert click["positives"] == labels[:, 0].sum() and click["rows"] == n
    better, equal = click["auc_difference"]["lightgbm-own"], click["auc_difference"]["lightgbm-all"]
    assert better["mean"] == pytest.approx(click["auc"]["ple"]["mean"] - click["auc"]["lightgbm-own"]["mean"])
    assert better["interval_95"][0] > 0.1 > abs(equal["mean"])
    assert equal["standard_error"] < better["standard_error"], "the same draws for both models"
    assert "lightgbm-own" in kuairand.table(result)


def test_trees_have_the_counts_of_past_visits_of_the_ranker(tmp_path: Path) -> None:
    path = tmp_path / "world"
    simulate(path, 12, 5, 2, 1)
    past = "features.past={tag={same='tag'},user={}}"
    job = load_config("configs/simulated.toml", [f"data.path={path}", "data.eval_from=2024-03-08", past])
    data = Dataset.open(str(path))
    split = split_in_time(job, data.spec)
    training, held_out = kuairand.tree_inputs(data, split, path)
    inputs = DenseInputs(data.spec, job.features)
    dense = kuairand.tree_dense(inputs, data, split, training, held_out)
    column = inputs.names.index("past:user:rows")
    for rows, values, limit in zip((training, held_out), dense, (None, split.train_until), strict=True):
        assert values.shape == (len(rows["visit_id"]), len(inputs.names))
        as_of = rows["request_ms"] if limit is None else np.full(len(values), limit)
        first, stop = data.histories.runs(rows["user_id"], as_of)
        expected = (stop - first).sum(axis=1)
        assert np.allclose(np.expm1(values[:, column]), expected, rtol=1e-4) and expected.max() > 0


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, real_kuairand: Path) -> None:
    monkeypatch.setattr(kuairand, "RESAMPLES", 20)
    trees = {name: {"n_estimators": 3, "num_leaves": 4} for name in kuairand.TREES}
    monkeypatch.setattr(kuairand, "TREES", trees)
    out = tmp_path / "results" / "kuairand.json"
    small = ["data.train_from=2022-05-03", "model.expert_layers=[[8], [8]]", "model.tower=[4]"]
    kuairand.main([f"--source={real_kuairand}", "--seeds=1", "--ranks=1", f"--out={out}", *small])
    written = json.loads(out.read_text())
    assert written["seeds"] == 1 and written["training_rows"] > 1000
    for found in written["result"].values():
        assert set(found["auc"]) == {"ple", *trees} and set(found["auc_difference"]) == set(trees)
