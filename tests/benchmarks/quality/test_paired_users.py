"""Paired differences of AUC and GAUC against scikit-learn, repeated rows, and known effects."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.quality.paired_users import DRAWS, UserMetric, paired_difference, user_rate
from tests.benchmarks.quality.weighted_auc import weighted_auc

USERS = 40


def rows(seed: int, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    user = np.sort(rng.integers(0, USERS, 3000))
    label = (rng.random(3000) < 0.3).astype(np.int64)
    # Rounded, so that there are ties.
    score = np.round(rng.standard_normal(3000) + effect * label, 1)
    return user, score, label


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_metrics_are_those_of_repeated_rows(seed: int) -> None:
    user, score, label = rows(seed, 0.5)
    weight = np.random.default_rng(seed).integers(0, 4, USERS)
    counts = np.stack([np.ones(USERS, np.int64), weight]).astype(np.uint16)
    repeated = np.repeat(np.arange(len(user)), weight[user])
    metric = UserMetric(user, score, label)
    assert metric.auc(counts).value == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    (drawn,) = metric.auc(counts).draws
    assert drawn == pytest.approx(roc_auc_score(label[repeated], score[repeated]), abs=1e-12)
    assert drawn == pytest.approx(weighted_auc(score, label, weight[user]), abs=1e-12)
    areas = [(roc_auc_score(label[user == one], score[user == one]), (user == one).sum()) for one in range(USERS)]
    expected = np.average([area for area, _ in areas], weights=[weight[one] * n for one, (_, n) in enumerate(areas)])
    assert metric.gauc(counts).draws == pytest.approx([expected], abs=1e-12)


def test_a_class_without_rows_has_no_value() -> None:
    assert np.isnan(weighted_auc(np.array([0.1, 0.2]), np.array([1, 1]), np.ones(2)))
    empty = np.zeros(0, np.int64)
    metric = UserMetric(empty, empty.astype(float), empty)
    counts = np.ones((1, 3), np.uint16)
    assert np.isnan(metric.auc(counts).value) and np.isnan(metric.gauc(counts).value)
    found = paired_difference([metric.auc], [metric.auc], 3)
    assert (found.mean, found.low, found.high) == (None, None, None)


@pytest.mark.parametrize("metric", ["auc", "gauc", "rate"])
def test_an_effect_is_found_and_none_is_not_invented(metric: str) -> None:
    user, better, label = rows(1, 0.8)
    worse = rows(1, 0.2)[1]
    if metric == "rate":
        one, other = (user_rate(user, (score * label > 0.5).astype(float)) for score in (worse, better))
    else:
        one, other = (getattr(UserMetric(user, score, label), metric) for score in (worse, better))
    found = paired_difference([one, one], [other, other], USERS)
    assert found.low is not None and found.high is not None and found.mean is not None
    assert 0 < found.low < found.mean < found.high and len(found.seeds) == 2
    same = paired_difference([one], [one], USERS)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_the_interval_covers_no_effect_as_often_as_it_says() -> None:
    """About 3 of 60 intervals leave out 0 where two models do not differ."""
    outside = 0
    for seed in range(60):
        user, first, label = rows(seed, 0.5)
        second = np.random.default_rng(1000 + seed).standard_normal(len(user)) + 0.5 * label
        metrics = [UserMetric(user, score, label).auc for score in (first, second)]
        found = paired_difference(metrics[:1], metrics[1:], USERS)
        assert found.low is not None and found.high is not None
        outside += not found.low <= 0 <= found.high
    assert outside <= 10


def test_a_rate_is_that_of_repeated_rows() -> None:
    user, score, _ = rows(4, 0.0)
    weight = np.random.default_rng(4).integers(0, 4, USERS)
    repeated = np.repeat(np.arange(len(user)), weight[user])
    counts = np.stack([np.ones(USERS, np.int64), weight, np.zeros(USERS, np.int64)]).astype(np.uint16)
    rate = user_rate(user, score)(counts)
    assert rate.value == pytest.approx(score.mean()) and rate.draws[0] == pytest.approx(score[repeated].mean())
    assert np.isnan(rate.draws[1])


@pytest.mark.parametrize("metric", ["auc", "gauc", "rate"])
def test_published_intervals_keep_their_draws(metric: str) -> None:
    """The draws of the published results: one multinomial after the other, of a generator with the seed 1."""
    user, one, label = rows(5, 0.3)
    other = rows(6, 0.6)[1]

    def plain(score: np.ndarray, weight: np.ndarray) -> float:
        if metric == "auc":
            return weighted_auc(score, label, weight[user])
        if metric == "rate":
            return float(np.average(score, weights=weight[user]))
        areas = [weighted_auc(score[user == n], label[user == n], np.ones((user == n).sum())) for n in range(USERS)]
        return float(np.average(areas, weights=weight * np.bincount(user, minlength=USERS)))

    random = np.random.default_rng(1)
    weights = [random.multinomial(USERS, np.full(USERS, 1 / USERS)).astype(float) for _ in range(DRAWS)]
    expected = np.percentile([100 * (plain(other, w) - plain(one, w)) for w in weights], [2.5, 97.5])
    measured = [
        user_rate(user, score) if metric == "rate" else getattr(UserMetric(user, score, label), metric)
        for score in (one, other)
    ]
    found = paired_difference(measured[:1], measured[1:], USERS)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-9)
