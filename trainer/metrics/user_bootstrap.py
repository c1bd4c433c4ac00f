"""Bootstrap over users: the spread of a metric, and of the difference of two models on the same rows.

Users are drawn with replacement, all rows of a user together. For a difference both models are evaluated on every draw,
so that its spread does not contain that some users are easy or hard for every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modules.compiled import compiled
from trainer.metrics.behaviour_metrics import user_auc


@dataclass(frozen=True)
class ResampledMetric:
    """A metric on the data and on every resample.

    Attributes:
        value: on the data; nan where undefined.
        draws: ``[resamples]`` float64, on the resamples.
    """

    value: float
    draws: np.ndarray


def draw_users(user_id: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw users with replacement.

    Returns:
        The index of each row's user, ``[rows] int64``, and the count of each user in each resample, ``[resamples + 1,
        users] uint16``; all counts of the first line are 1.
    """
    users, index = np.unique(user_id, return_inverse=True)
    random = np.random.default_rng(seed)
    # The counts of a user lie side by side, as the loop over the rows reads them.
    counts = np.ones((len(users), resamples + 1), dtype=np.uint16).T
    for draw in counts[1:]:
        draw[:] = np.bincount(random.integers(0, len(users), len(users)), minlength=len(users))
    return index, counts


def resample_auc(index: np.ndarray, counts: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> ResampledMetric:
    """Return the AUC of ``scores [rows]`` under every line of ``counts``; ties count half."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    # Rows of equal score form a group: a positive wins against the negatives of earlier groups and half of its own.
    ends = np.append(ranked[1:] != ranked[:-1], True)
    draws = _auc_draws(index[order], labels[order] > 0, ends, np.ascontiguousarray(counts.T))
    return ResampledMetric(float(draws[0]), draws[1:])


@compiled("the bootstrap over users")
def _auc_draws(user: np.ndarray, positive: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the AUC of every draw, ``[draws]`` float64; nan where a class has no weight.

    Args:
        user: ``[rows]`` int64, user of each row, in the order of the scores.
        positive: ``[rows]`` bool.
        ends: ``[rows]`` bool, True for the last row of a group of equal scores.
        counts: ``[users, draws]``, so that the counts of one row lie side by side.
    """
    draws = counts.shape[1]
    wins, below, above = np.zeros(draws), np.zeros(draws), np.zeros(draws)
    group_negative, group_positive = np.zeros(draws), np.zeros(draws)
    for row in range(len(user)):
        weights = counts[user[row]]
        if positive[row]:
            for draw in range(draws):
                group_positive[draw] += weights[draw]
        else:
            for draw in range(draws):
                group_negative[draw] += weights[draw]
        if ends[row]:
            for draw in range(draws):
                wins[draw] += group_positive[draw] * (below[draw] + group_negative[draw] / 2)
                below[draw] += group_negative[draw]
                above[draw] += group_positive[draw]
                group_negative[draw] = 0.0
                group_positive[draw] = 0.0
    result = np.full(draws, np.nan)
    for draw in range(draws):
        if below[draw] > 0 and above[draw] > 0:
            result[draw] = wins[draw] / (below[draw] * above[draw])
    return result


def resample_gauc(index: np.ndarray, counts: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> ResampledMetric:
    """Return the GAUC under every line of ``counts``: a user's AUC stays, its weight is drawn."""
    users, aucs, rows = user_auc(index, scores, labels)
    weight = counts[:, users] * rows[None].astype(np.float64)
    with np.errstate(invalid="ignore"):
        joined = weight @ aucs / weight.sum(1)
    return ResampledMetric(float(joined[0]), joined[1:])


def resample_mean(index: np.ndarray, counts: np.ndarray, values: np.ndarray) -> ResampledMetric:
    """Return the mean of ``values [rows]`` under every line of ``counts``."""
    users = counts.shape[1]
    sums, rows = np.bincount(index, values, users), np.bincount(index, minlength=users)
    weight = counts.astype(np.float64)
    with np.errstate(invalid="ignore"):
        means = (weight @ sums) / (weight @ rows)
    return ResampledMetric(float(means[0]), means[1:])


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap draws; nan if no draw has a value."""
    if not np.isfinite(draws).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
