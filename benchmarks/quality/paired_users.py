"""Differences of AUC, GAUC and rates between two models on the same rows, with intervals over users.

A bootstrap draws users with replacement; both models are measured on the same draw, so what makes a draw easy or hard
cancels. Models that were trained with several seeds are averaged inside each draw: the interval is about the users, and
the mean over the seeds stands for the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 200

Metric = Callable[[np.ndarray], float]
"""Value of a metric in points of 0 to 1 if the users count ``[users]`` times; NaN if it is undefined."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a metric between two models, in points.

    Attributes:
        mean: on all users, mean over the seeds.
        low, high: 95 % interval over users; None if there are fewer than two users.
        seeds: difference of each seed.
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: list[float]


def weighted_auc(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    """Return the AUC of rows that count ``weight [n]`` times; equal scores count half. NaN if a class has no weight."""
    values, place = np.unique(score, return_inverse=True)
    positive = np.bincount(place, weight * label, len(values))
    negative = np.bincount(place, weight * (1 - label), len(values))
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")


class UserMetric:
    """One model's scores of some rows, ready to be measured on many draws of users.

    Args:
        user: ``[n]`` int64, places of the users in a list, from 0 on.
        score: ``[n]``.
        label: ``[n]``, 0 or 1.
    """

    def __init__(self, user: np.ndarray, score: np.ndarray, label: np.ndarray) -> None:
        order = np.argsort(score, kind="stable")
        self._user, self._label = user[order], label[order].astype(np.float64)
        sorted_score = score[order]
        # Rows with equal scores form one group; sums over groups make ties count half.
        self._group = np.cumsum(np.r_[False, sorted_score[1:] != sorted_score[:-1]]) if len(order) else order
        self._groups = int(self._group[-1]) + 1 if len(order) else 0
        self._area, self._rows = _areas_by_user(user, score, label)

    def auc(self, weight: np.ndarray) -> float:
        """Return the AUC if the users count ``weight [users]`` times."""
        weights = weight[self._user]
        positive = np.bincount(self._group, weights * self._label, self._groups)
        negative = np.bincount(self._group, weights * (1 - self._label), self._groups)
        pairs = positive.sum() * negative.sum()
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")

    def gauc(self, weight: np.ndarray) -> float:
        """Return the GAUC, weighted by rows, if the users count ``weight [users]`` times."""
        share = np.zeros(len(weight))
        share[: len(self._rows)] = self._rows
        share *= weight
        area = np.zeros(len(weight))
        area[: len(self._area)] = self._area
        return float((share * area).sum() / share.sum()) if share.sum() else float("nan")


def user_rate(user: np.ndarray, value: np.ndarray, users: int) -> Metric:
    """Return the metric "mean of ``value [n]`` over the rows", such as the share of hits."""
    total, rows = np.bincount(user, value, users), np.bincount(user, minlength=users)

    def rate(weight: np.ndarray) -> float:
        count = float((weight * rows).sum())
        return float((weight * total).sum() / count) if count else float("nan")

    return rate


def paired_difference(first: Sequence[Metric], second: Sequence[Metric], users: int, seed: int = 1) -> PairedDifference:
    """Return ``second - first`` in points.

    Args:
        first, second: the same metric of the same rows by two models, one entry for each seed, in the same order.
        users: number of users.
        seed: of the draws.
    """

    def difference(weight: np.ndarray) -> list[float]:
        return [100 * (other(weight) - one(weight)) for one, other in zip(first, second, strict=True)]

    seeds = difference(np.ones(users))
    if not seeds or not np.isfinite(seeds).all():
        return PairedDifference(None, None, None, seeds)
    rng = np.random.default_rng(seed)
    draws = [
        float(np.mean(difference(rng.multinomial(users, np.full(users, 1 / users)).astype(np.float64))))
        for _ in range(DRAWS if users > 1 else 0)
    ]
    known = [draw for draw in draws if np.isfinite(draw)]
    low, high = np.percentile(known, [2.5, 97.5]).tolist() if known else (None, None)
    return PairedDifference(float(np.mean(seeds)), low, high, seeds)


def _areas_by_user(user: np.ndarray, score: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each user's AUC and the number of the user's rows, both 0 for users without both classes."""
    users = int(user.max()) + 1 if len(user) else 0
    area, rows = np.zeros(users), np.zeros(users)
    order = np.argsort(user, kind="stable")
    bounds = np.searchsorted(user[order], np.arange(users + 1))
    for one in range(users):
        of_user = order[bounds[one] : bounds[one + 1]]
        if len(of_user):
            found = weighted_auc(score[of_user], label[of_user], np.ones(len(of_user)))
            if np.isfinite(found):
                area[one], rows[one] = found, len(of_user)
    return area, rows
