"""Paired bootstrap over users, for the difference of two models on the same rows.

Users are drawn with replacement, all rows of a user together, and both models are evaluated on every draw. So the
spread of the difference does not contain that some users are easy or hard for every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.metrics.behaviour_metrics import user_auc

_CHUNK = 50
"""Resamples evaluated at once: bounds the memory at ``_CHUNK * rows`` floats."""


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
        users] int32``; all counts of the first line are 1.
    """
    users, index = np.unique(user_id, return_inverse=True)
    random = np.random.default_rng(seed)
    counts = np.ones((resamples + 1, len(users)), dtype=np.int32)
    for draw in counts[1:]:
        draw[:] = np.bincount(random.integers(0, len(users), len(users)), minlength=len(users))
    return index, counts


def resample_auc(index: np.ndarray, counts: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> ResampledMetric:
    """Return the AUC of ``scores [rows]`` under every line of ``counts``; ties count half."""
    order = np.argsort(scores, kind="stable")
    ranked, positive, user = scores[order], labels[order] > 0, index[order]
    # Rows of equal score form a group: a positive wins against the negatives of earlier groups and half of its own.
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    draws = []
    for first in range(0, len(counts), _CHUNK):
        weight = counts[first : first + _CHUNK][:, user].astype(np.float64)
        negatives = np.add.reduceat(weight * ~positive, starts, axis=1)
        positives = np.add.reduceat(weight * positive, starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives / 2
        with np.errstate(invalid="ignore"):
            draws.append((positives * below).sum(1) / (positives.sum(1) * negatives.sum(1)))
    joined = np.concatenate(draws)
    return ResampledMetric(float(joined[0]), joined[1:])


def resample_gauc(index: np.ndarray, counts: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> ResampledMetric:
    """Return the GAUC under every line of ``counts``: a user's AUC stays, its weight is drawn."""
    users, aucs, rows = user_auc(index, scores, labels)
    weight = counts[:, users] * rows[None].astype(np.float64)
    with np.errstate(invalid="ignore"):
        joined = weight @ aucs / weight.sum(1)
    return ResampledMetric(float(joined[0]), joined[1:])


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap draws."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
