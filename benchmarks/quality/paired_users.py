"""Differences of AUC, GAUC and rates between two models on the same rows, with intervals over users.

The bootstrap is that of ``trainer/metrics/user_bootstrap.py``: both models are measured on the same draws of users, so
what makes a draw easy or hard cancels. Models that were trained with several seeds are averaged inside each draw: the
interval is about the users, and the mean over the seeds stands for the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics.user_bootstrap import ResampledMetric, interval, resample_auc, resample_gauc, resample_mean

DRAWS = 200

Metric = Callable[[np.ndarray], ResampledMetric]
"""Metric in points of 0 to 1 if the users count as in each line of ``[draws + 1, users]``; NaN where undefined."""


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


class UserMetric:
    """One model's scores of some rows, ready to be measured on many draws of users.

    Args:
        user: ``[n]`` int64, places of the users in a list, from 0 on.
        score: ``[n]``.
        label: ``[n]``, 0 or 1.
    """

    def __init__(self, user: np.ndarray, score: np.ndarray, label: np.ndarray) -> None:
        self._user, self._score, self._label = user, score, label

    def auc(self, counts: np.ndarray) -> ResampledMetric:
        """Return the AUC under every line of ``counts [draws + 1, users]``."""
        return resample_auc(self._user, counts, self._score, self._label)

    def gauc(self, counts: np.ndarray) -> ResampledMetric:
        """Return the GAUC, weighted by rows, under every line of ``counts [draws + 1, users]``."""
        return resample_gauc(self._user, counts, self._score, self._label)


def user_rate(user: np.ndarray, value: np.ndarray) -> Metric:
    """Return the metric "mean of ``value [n]`` over the rows", such as the share of hits."""
    return lambda counts: resample_mean(user, counts, value)


def on_all_users(metric: Metric, users: int) -> float:
    """Return the value of a metric if each of the users counts once; NaN if it is undefined."""
    return metric(np.ones((1, users), np.uint16)).value


def paired_difference(first: Sequence[Metric], second: Sequence[Metric], users: int, seed: int = 1) -> PairedDifference:
    """Return ``second - first`` in points.

    Args:
        first, second: the same metric of the same rows by two models, one entry for each seed, in the same order.
        users: number of users.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    counts = np.ones((1 + (DRAWS if users > 1 else 0), users), np.uint16)
    for line in counts[1:]:
        # One by one, as in the results that are published: one call for all draws gives others.
        line[:] = rng.multinomial(users, np.full(users, 1 / users))
    pairs = [(one(counts), other(counts)) for one, other in zip(first, second, strict=True)]
    seeds = [100 * (other.value - one.value) for one, other in pairs]
    if not seeds or not np.isfinite(seeds).all():
        return PairedDifference(None, None, None, seeds)
    low, high = interval(np.mean([100 * (other.draws - one.draws) for one, other in pairs], axis=0))
    known = np.isfinite(low)
    return PairedDifference(float(np.mean(seeds)), low if known else None, high if known else None, seeds)
