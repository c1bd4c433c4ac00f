"""A plain AUC of weighted rows, as a reference."""

from __future__ import annotations

import numpy as np


def weighted_auc(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    """Return the AUC of rows that count ``weight [n]`` times; equal scores count half. NaN if a class has no weight."""
    values, place = np.unique(score, return_inverse=True)
    positive = np.bincount(place, weight * label, len(values))
    negative = np.bincount(place, weight * (1 - label), len(values))
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")
