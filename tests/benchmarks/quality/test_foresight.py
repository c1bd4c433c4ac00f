"""The benchmark of Foresight: its codes and ceilings, its tables, and all of its parts at a size of seconds."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import foresight
from benchmarks.quality.foresight_report import (
    ALL,
    BOTH,
    MODEL,
    NO_CONTENT,
    SEEN,
    TOPICS,
    UNSEEN,
    Setting,
    make_settings,
    predictor_result,
    ranker_result,
)
from benchmarks.quality.foresight_world import (
    FORECAST,
    LAST,
    TRUTH,
    write_ceiling,
    write_leaking_world,
    write_noisy_world,
    write_topic_codes,
)
from benchmarks.quality.larm_report import Scores
from trainer.config.foresight import load_foresight
from trainer.data.format.content_vectors import SEGMENT_VECTORS, ContentVectors
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.verification import verify_dataset
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.segment_truth import read_next_topics
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
from trainer.data.simulator.write_dataset import simulate
from trainer.semantic_ids.foresight_data import ForesightData

USERS, DAYS, SEED, NEWCOMERS = 30, 3, 1, 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small world with segment vectors."""
    path = tmp_path_factory.mktemp("worlds") / "world"
    simulate(path, USERS, DAYS, 2, SEED, segment_noise=DEFAULT_NOISE, newcomers=NEWCOMERS)
    return path


def test_topics_as_codes_have_the_truth_of_the_world(world: Path, tmp_path: Path) -> None:
    write_topic_codes(world, tmp_path / "codebook", tmp_path / "codes.parquet")
    data = ForesightData.open(
        load_foresight(
            "configs/foresight.toml",
            [
                f"data.path={world}",
                f"data.codes={tmp_path / 'codes.parquet'}",
                f"data.codebook={tmp_path / 'codebook'}",
                "data.train_until=2024-03-06",
            ],
        )
    )
    assert data.truth is not None and len(data.training) > 100 and len(data.held_out) > 100
    found = read_next_topics(world)
    assert found is not None and np.array_equal(data.rows.code, found[0][data.rows.segment])
    # A centroid is the mean of the vectors of its topic, but for what belongs to few authors.
    vectors = ContentVectors.open(world / SEGMENT_VECTORS).vectors.astype(np.float32)
    for topic in np.unique(found[0]):
        error = vectors[found[0] == topic].mean(0) - data.centroids[topic].numpy()
        assert np.linalg.norm(error) < np.linalg.norm(data.centroids[topic].numpy())


def test_a_copy_with_the_same_noise_has_the_same_vectors(world: Path, tmp_path: Path) -> None:
    config = WorldConfig(USERS, DAYS, SEED, newcomers=NEWCOMERS)
    write_noisy_world(world, tmp_path / "same", config, DEFAULT_NOISE)
    old = ContentVectors.open(world / SEGMENT_VECTORS)
    assert ContentVectors.open(tmp_path / "same" / SEGMENT_VECTORS).hash == old.hash
    write_noisy_world(world, tmp_path / "loud", config, 3 * DEFAULT_NOISE)
    loud = ContentVectors.open(tmp_path / "loud" / SEGMENT_VECTORS)
    # The difference is twice the noise, whose mean squared length is known.
    difference = loud.vectors.astype(np.float64) - old.vectors
    assert (difference**2).sum(1).mean() == pytest.approx((2 * DEFAULT_NOISE) ** 2, rel=0.1)
    truth = [pq.read_table(path / "truth/segment_vectors.parquet").to_pylist() for path in (world, tmp_path / "loud")]
    for before, after in zip(*truth, strict=True):
        factor = 3 if before["part"] == "noise" else 1
        assert np.allclose(after["vector"], factor * np.array(before["vector"]), rtol=1e-5)
    assert not verify_dataset(str(tmp_path / "loud"), lambda what, done, total: None).problems


def test_in_the_leaking_world_a_segment_is_known_when_it_begins(world: Path, tmp_path: Path) -> None:
    before = DatasetSegments.read(str(world), embedded=False)
    write_leaking_world(world, tmp_path / "leaking")
    found = DatasetSegments.read(str(tmp_path / "leaking"), embedded=False)
    assert np.array_equal(found.known_ms, before.start_ms) and np.array_equal(found.author_id, before.author_id)
    # The links of the copy must not have changed the world itself.
    assert np.array_equal(DatasetSegments.read(str(world), embedded=False).known_ms, before.known_ms)
    assert not verify_dataset(str(world), lambda what, done, total: None).problems


def test_ceilings_are_the_topics_and_the_truth_of_the_next_ones(world: Path, tmp_path: Path) -> None:
    known_ms = DatasetSegments.read(str(world), embedded=False).known_ms
    border = int(np.median(known_ms))
    truth = read_next_topics(world)
    assert truth is not None
    for kind in (LAST, FORECAST, TRUTH):
        write_ceiling(world, kind, tmp_path / kind, border)
        table = ContentVectors.open(tmp_path / kind)
        assert np.array_equal(table.ids, np.flatnonzero(known_ms >= border))
        assert np.allclose(table.vectors.sum(1), 1, atol=2e-3)
        if kind == FORECAST:
            assert np.allclose(table.vectors, truth[1][table.ids], atol=1e-3)
        else:
            assert np.array_equal(table.vectors.argmax(1), truth[0][table.ids])


def test_all_rows_are_seen_and_unseen_ones_by_their_shares() -> None:
    def quality(top_1: float) -> dict[str, float]:
        return {"top_1": top_1, "top_10": 1.0, "nll": 1.0}

    rules = {
        "rows": {ALL: 100, SEEN: 75},
        "training": 10,
        "persistence": 0.5,
        "quality": {
            SEEN: {"last": quality(0.2), "bayes": quality(0.9)},
            UNSEEN: {"last": quality(0.4), "bayes": quality(0.9)},
        },
        "reference": {"accuracy": 0.5},
    }
    runs = [{"quality": {SEEN: {**quality(value)}, UNSEEN: quality(0.8)}, "seconds": 1.0} for value in (0.3, 0.5)]
    found = predictor_result({"a": Setting(4, 0.8)}, {"a": rules}, {"a": runs})["a"]
    assert found["quality"][ALL]["last"]["top_1"] == pytest.approx(0.25)
    assert found["quality"][ALL][MODEL]["top_1"][0] == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    assert found["targets"]["best_rule"] == "last", "the truth is no rule"
    assert found["targets"]["to_best_rule"] == pytest.approx(2) and found["targets"]["to_reference"] == 1
    assert found["targets"]["nll_to_bayes"] == 1


def test_a_better_ranker_has_a_larger_auc() -> None:
    rng, n = np.random.default_rng(2), 2000
    label = (rng.random((n, 1)) < 0.3).astype(np.float32)
    base = rng.random((n, 1)).astype(np.float32)
    user = rng.integers(0, 60, n)

    def scores(probability: np.ndarray) -> list[Scores]:
        return 2 * [Scores(("click",), user, np.arange(n), probability, label, np.ones_like(label), 0.0)]

    values = {NO_CONTENT: base, LAST: base + 0.2 * label, FORECAST: base + 0.4 * label}
    found = ranker_result({name: scores(value) for name, value in values.items()})["click"]
    for metric in ("auc", "gauc"):
        differences = {(one["variant"], one["to"]): one for one in found[metric]["differences"]}
        assert set(differences) == {(LAST, NO_CONTENT), (FORECAST, NO_CONTENT), (FORECAST, LAST)}
        assert all(one["low"] > 0 for one in differences.values())
        assert differences[FORECAST, NO_CONTENT]["mean"] > differences[LAST, NO_CONTENT]["mean"]


def test_rankers_with_forecasts_of_another_predictor_are_other_files(tmp_path: Path) -> None:
    def names(seeds: list[int]) -> dict[str, Path]:
        options = Namespace(work=tmp_path, codes=[4, 6, 8], noises=[1.6], settings=None, seeds=seeds)
        work = foresight.ForesightWork(options, Mock())
        return {variant: work._scores_file(variant, 1) for variant in (NO_CONTENT, TRUTH, BOTH)}

    first, more, second = names([1]), names([1, 2]), names([2])
    assert first == more and first[BOTH] != second[BOTH]
    assert first[NO_CONTENT] == second[NO_CONTENT] and first[TRUTH] == second[TRUTH]


def test_all_parts_run(
    limelight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        done = limelight(*map(str, arguments))
        assert done.status == 0, done.stdout + done.stderr

    settings = make_settings([4, 6, 8], [1.6], DEFAULT_NOISE)
    shown = {name: settings[name] for name in (TOPICS, "6 codes, all days")}
    monkeypatch.setattr(foresight, "run_limelight", run)
    monkeypatch.setattr(foresight, "make_settings", lambda *arguments: shown)
    work, out = tmp_path / "work", tmp_path / "foresight.json"
    arguments = ["--work", str(work), "--out", str(out), "--users", "60", "--days", "4", "--borders", "2", "3"]
    arguments += ["--codes", "4", "6", "8", "--rows", "40", "--reference-targets", "10", "--seeds", "1"]
    arguments += ["--rankers", NO_CONTENT, BOTH, TRUTH]
    arguments += ["--predictor", "model.dim=8", "model.heads=2", "model.feed_forward=8", "data.runs=8"]
    arguments += ["--ranker", "model.expert_layers=[[8],[8]]", "model.tower=[8]", "data.workers=0"]
    foresight.main(arguments)
    printed = capsys.readouterr().out
    assert "knows style and topic" in printed and "click, " in printed and "bayes" in printed
    document = json.loads(out.read_text())
    assert set(document["predictor"]) == set(shown) and set(document["ranker"]) >= {"click", "gift"}
    assert document["predictor"][TOPICS]["targets"]["nll_to_bayes"] > 1
    assert out.with_suffix(".png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    foresight.main(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}, "nothing twice"
    # Of a benchmark that was stopped, the finished parts are reported: here the only seed of two.
    foresight.main([*arguments, "--seeds", "1", "2", "--finished"])
    again = json.loads(out.read_text())
    assert (again["predictor"], again["ranker"]) == (document["predictor"], document["ranker"])
    assert again["ranker_seeds"] == 1 and again["predictor"][TOPICS]["seeds"] == 1
