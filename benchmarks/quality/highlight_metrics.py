"""Metrics of highlight prediction in one room, as KuaiLive-M3's benchmark defines them, and where they differ from it.

Source: github.com/imgkkk574/KuaiLive-M3, ``highlight/train_highlight.py`` and ``highlight/preprocess_highlight.py`` at
58e8765. A model gives each segment of a room a number before the segment is on air. The room's segments have true
scores; a segment is a *highlight* if its score is at least the 70th percentile of all scores of the room (linear
interpolation between ranks, as ``numpy.percentile``), so about 30 % are.

``mAP``
    Average precision of the highlights in the ranking by prediction: the sum over the ranks of ``(R_k - R_{k-1}) P_k``
    with precision ``P_k`` and recall ``R_k`` of the k segments with the largest predictions, without interpolation, as
    ``sklearn.metrics.average_precision_score``. Equal predictions are one step. Undefined if all or no segments are
    highlights. The mean over the rooms is the mAP.
``F1@50%``
    The ``max(1, floor(K / 2))`` segments of K with the largest predictions are called highlights; F1 is the harmonic
    mean of precision and recall of these against the highlights. Since 50 % are called and 30 % are highlights, a
    perfect prediction has 0.75. Undefined without a highlight, where the source has 0.
``tau``
    Kendall's tau-b of predictions and scores (``scipy.stats.kendalltau``).
``tau > 0.2``, ``tau > 0.4``
    Over the pairs of segments whose scores differ by more than this: ``(concordant - discordant) / pairs``; a pair with
    equal predictions is neither. Undefined without such a pair. The source correlates the differences of the pairs
    with each other, and only of the earlier with the later segment, which is no Kendall's tau of the segments.
``rho``
    Spearman's rank correlation of predictions and scores (``scipy.stats.spearmanr``).

Predictions that are all equal rank nothing: their F1 is the expectation over random orders, here and for every tie at
the border of the half, and their correlations are 0. The source takes the order of ``numpy.argsort``, and leaves such
rooms out of the means of the correlations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

PERCENTILE = 70
DELTAS = (0.2, 0.4)
METRICS = ("mAP", "F1@50%", "tau", *(f"tau > {delta}" for delta in DELTAS), "rho")


def find_highlights(score: np.ndarray) -> np.ndarray:
    """Return which segments of a room are highlights, ``[K] bool``; ``score [K]`` is of all of its segments."""
    found: np.ndarray = score >= np.percentile(score, PERCENTILE)
    return found


def room_metrics(predicted: np.ndarray, score: np.ndarray, highlight: np.ndarray) -> dict[str, float]:
    """Return the metrics of a room by name; nan where undefined.

    Args:
        predicted: ``[K]``, predictions.
        score: ``[K]``, true scores, whose range is about 1.
        highlight: ``[K] bool``.
    """
    found = {
        "mAP": average_precision(predicted, highlight),
        "F1@50%": f1_of_half(predicted, highlight),
        "tau": _correlation(kendalltau, predicted, score),
        **{f"tau > {delta}": tau_of_distant(predicted, score, delta) for delta in DELTAS},
        "rho": _correlation(spearmanr, predicted, score),
    }
    return {name: found[name] for name in METRICS}


def average_precision(predicted: np.ndarray, highlight: np.ndarray) -> float:
    """Return the average precision of the highlights; nan if all or no segments are highlights."""
    if not 0 < highlight.sum() < len(highlight):
        return np.nan
    order = np.argsort(-predicted, kind="stable")
    # Equal predictions are one step, at the last of them.
    ends = np.flatnonzero(np.append(np.diff(predicted[order]) != 0, True))
    found = np.cumsum(highlight[order])[ends]
    precision, recall = found / (ends + 1), found / highlight.sum()
    return float((np.diff(recall, prepend=0) * precision).sum())


def f1_of_half(predicted: np.ndarray, highlight: np.ndarray) -> float:
    """Return the F1 of the half with the largest predictions; the expectation over the orders of equal ones."""
    true = int(highlight.sum())
    if not true:
        return np.nan
    count = max(1, len(predicted) // 2)
    border = np.sort(predicted)[-count]
    above, tied = predicted > border, predicted == border
    share = (count - above.sum()) / tied.sum()
    hits = (highlight & above).sum() + share * (highlight & tied).sum()
    # The harmonic mean of hits / count and hits / true.
    return float(2 * hits / (count + true))


def tau_of_distant(predicted: np.ndarray, score: np.ndarray, delta: float) -> float:
    """Return ``(concordant - discordant) / pairs`` over the pairs whose scores differ by more than ``delta``."""
    one, other = np.triu_indices(len(score), 1)
    difference = score[one] - score[other]
    distant = np.abs(difference) > delta
    if not distant.any():
        return np.nan
    return float((np.sign(predicted[one] - predicted[other]) * np.sign(difference))[distant].mean())


def _correlation(of: Callable[..., Any], predicted: np.ndarray, score: np.ndarray) -> float:
    if score.min() == score.max():
        return np.nan
    if predicted.min() == predicted.max():
        return 0.0
    return float(of(predicted, score).statistic)
