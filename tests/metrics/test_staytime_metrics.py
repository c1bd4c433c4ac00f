"""Staytime metrics compared with hand-made cases and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from trainer.metrics.staytime_metrics import (
    RANKS,
    comment_metrics,
    list_metrics,
    metrics_by_exposure,
    regression_metrics,
    released_metrics,
    staytime_metrics,
    xauc,
)


def a(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def plain_xauc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    right = pairs = 0.0
    for i, j in itertools.combinations(range(len(labels)), 2):
        if labels[i] != labels[j]:
            pairs += 1
            right += 0.5 if scores[i] == scores[j] else (scores[i] < scores[j]) == (labels[i] < labels[j])
    return right / pairs if pairs else None


def test_regression_of_all_rows_and_of_opened_ones() -> None:
    found = regression_metrics(a(0, 0, 4, 10), a(1, 0, 1, 6))
    assert found["rmse"] == pytest.approx(np.sqrt((1 + 0 + 9 + 16) / 4))
    assert found["mae"] == pytest.approx((1 + 0 + 3 + 4) / 4)
    assert found["rmse_opened"] == pytest.approx(np.sqrt((9 + 16) / 2))
    assert found["mae_opened"] == pytest.approx(3.5)
    assert found["bias"] == pytest.approx(8 / 14)


def test_regression_without_opened_rows_and_without_rows() -> None:
    found = regression_metrics(a(0, 0), a(1, 3))
    assert (found["mae"], found["mae_opened"], found["rmse_opened"], found["bias"]) == (2, None, None, None)
    assert set(regression_metrics(a(), a()).values()) == {None}


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        (a(1, 2, 3), a(1, 2, 3), 1.0),
        (a(1, 2, 3), a(3, 2, 1), 0.0),
        (a(1, 2, 3), a(5, 5, 5), 0.5),
        (a(0, 0, 5), a(1, 2, 3), 1.0),
        (a(0, 0, 5), a(3, 1, 2), 0.5),
        (a(0, 5, 5), a(1, 1, 2), 0.75),
        (a(7, 7, 7), a(1, 2, 3), None),
        (a(7), a(1), None),
        (a(), a(), None),
    ],
)
def test_xauc_by_hand(labels: np.ndarray, scores: np.ndarray, expected: float | None) -> None:
    assert xauc(labels, scores) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 5)), max_size=40))
def test_xauc_is_the_brute_force_over_pairs(rows: list[tuple[int, int]]) -> None:
    labels, scores = (np.array([row[k] for row in rows], np.float64) for k in range(2))
    assert xauc(labels, scores) == pytest.approx(plain_xauc(labels, scores))


@pytest.mark.parametrize("seed", range(3))
def test_xauc_of_many_rows_without_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, scores = random.random(400), random.random(400)
    assert xauc(labels, scores) == pytest.approx(plain_xauc(labels, scores), abs=1e-12)


def test_lists_by_hand() -> None:
    # User 1 opened his second of three; user 2 his first and third; user 3 nothing.
    user = ids(1, 1, 1, 2, 2, 2, 3)
    score = a(0.9, 0.8, 0.1, 0.7, 0.6, 0.5, 0.4)
    seconds = a(0, 20, 0, 3, 0, 6, 0)
    found = list_metrics(user, seconds, score)
    assert found["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["ndcg@1"] == pytest.approx((0 + 1) / 2)
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    assert found["ndcg@3"] == pytest.approx((second + (1 + third) / (1 + second)) / 2)
    assert found["ndcg@5"] == pytest.approx(found["ndcg@3"])
    assert found["wt@1"] == pytest.approx((0 + 3 + 0) / 3)
    assert found["wt@3"] == pytest.approx((20 + 9 + 0) / 3)
    assert found["gauc"] == pytest.approx((3 * 0.5 + 3 * 0.5) / 6)
    # Seconds above zero are all one positive: an opening.
    assert list_metrics(user, np.sign(seconds), score)["ndcg@3"] == found["ndcg@3"]


def test_constant_labels_have_no_order() -> None:
    user, score = ids(1, 1, 2), a(0.1, 0.2, 0.3)
    nothing = staytime_metrics(user, a(0, 0, 0), score, score)
    undefined = {"rmse_opened", "mae_opened", "bias", "xauc", "gauc", "uauc", "mrr", *(f"ndcg@{k}" for k in RANKS)}
    assert {name for name, value in nothing.items() if value is None} == undefined
    assert nothing["wt@3"] == 0
    same = staytime_metrics(user, a(5, 5, 5), score, score)
    assert (same["xauc"], same["gauc"]) == (None, None)
    assert (same["mrr"], same["ndcg@1"], same["wt@1"]) == (1, 1, 5)
    assert released_metrics(user, a(5, 5, 5), score, score)["xauc"] == 1


def test_no_rows() -> None:
    none = np.zeros(0)
    found = staytime_metrics(none.astype(np.int64), none, none, none)
    assert {value for name, value in found.items() if name not in ("rows", "opened")} == {None}
    assert (found["rows"], found["opened"]) == (0, 0)


def over_orders(user: np.ndarray, seconds: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Compare with the mean over all orders of equal scores, each made by distinct scores in that order."""
    found: dict[str, list[float]] = {}
    for order in itertools.permutations(range(len(user))):
        apart = score - 1e-6 * np.array(order)
        for name, value in list_metrics(user, seconds, apart).items():
            if name not in ("gauc", "uauc"):
                found.setdefault(name, []).append(float(value or 0))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_equal_scores_are_the_mean_over_their_orders(seed: int) -> None:
    random = np.random.default_rng(seed)
    user, score = random.integers(0, 2, 5), random.integers(0, 2, 5).astype(np.float64)
    seconds = random.integers(0, 3, 5).astype(np.float64)
    seconds[0] = 1
    found = list_metrics(user, seconds, score)
    for name, expected in over_orders(user, seconds, score).items():
        assert found[name] == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("seed", range(3))
def test_ndcg_agrees_with_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(30), 8)
    score, opened = random.random(240), (random.random(240) < 0.3).astype(np.float64)
    for k in RANKS:
        expected = [
            ndcg_score(opened[user == u][None], score[user == u][None], k=k)
            for u in range(30)
            if opened[user == u].any()
        ]
        assert list_metrics(user, opened, score)[f"ndcg@{k}"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_says_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    user, score = random.integers(0, 9, 200), random.integers(0, 5, 200).astype(np.float64)
    seconds = np.where(random.random(200) < 0.3, random.random(200), 0.0)
    order = random.permutation(200)
    found = staytime_metrics(user, seconds, score, score)
    again = staytime_metrics(user[order], seconds[order], score[order], score[order])
    for name, value in found.items():
        assert again[name] == pytest.approx(value), name


def test_what_the_released_code_calls_these() -> None:
    user, score = ids(1, 1, 2, 2), a(0.2, 0.1, 0.9, 0.8)
    seconds = a(5, 0, 0, 0)
    found = released_metrics(user, seconds, score, score)
    # One AUC over all users: the opened row is below two of the three others; within its user it is on top.
    assert found["gauc"] == pytest.approx(1 / 3)
    assert list_metrics(user, seconds, score)["gauc"] == 1
    # Three pairs with different labels, one of them right; the three with equal labels count as right.
    assert found["xauc"] == pytest.approx((1 + 3) / 6)
    # The user who opened nothing counts as 0.
    assert (found["mrr"], found["ndcg@1"]) == (0.5, 0.5)


def test_random_scores_look_good_to_the_released_xauc() -> None:
    random = np.random.default_rng(1)
    seconds = np.where(random.random(20_000) < 0.134, random.random(20_000), 0.0)
    score = random.random(20_000)
    user = random.integers(0, 500, 20_000)
    assert released_metrics(user, seconds, score, score)["xauc"] == pytest.approx(0.88, abs=0.01)
    assert xauc(seconds, score) == pytest.approx(0.5, abs=0.02)


def test_groups_by_exposure() -> None:
    exposures = ids(0, 1, 5, 6, 50, 51, 9999)
    seconds = a(1, 2, 3, 4, 5, 6, 7)
    found = metrics_by_exposure(exposures, np.arange(7), seconds, np.zeros(7), np.zeros(7))
    assert {name: (group["rows"], group["mae"]) for name, group in found.items()} == {
        "0": (1, 1),
        "1-5": (2, 2.5),
        "6-50": (2, 4.5),
        "more": (2, 6.5),
    }


def test_comments_of_a_row_are_compared_with_each_other_only() -> None:
    present = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    truth = np.array([[5, 2, 0], [0, 1, 9], [4, 4, 4]])
    scores = np.array([[0.9, 0.1, 0.5], [0.3, 0.3, 0.0], [1, 2, 3]])
    found = comment_metrics({"popular": scores}, {"popular": truth}, present)
    assert found == {"popular": {"auc": pytest.approx((2 / 3 + 1 / 2) / 2), "rows": 2}}
    assert comment_metrics({"x": scores[2:]}, {"x": truth[2:]}, present[2:])["x"] == {"auc": None, "rows": 0}
