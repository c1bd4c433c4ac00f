"""How far predictions are from the truth, and how soon they follow when it jumps; for :mod:`benchmarks.moment`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.metrics.behaviour_metrics import auc, grouped_auc

WINDOW_S = 30.0
"""Means over exposures are over so many seconds, centred: half of them lie behind the moment."""

STEP_S = 5.0
BEFORE_S = 60.0
"""What was predicted before a jump is the mean over so many seconds."""

_EPSILON = 1e-6


@dataclass(frozen=True)
class Jump:
    """The click probability of a room jumps.

    Attributes:
        at_s: when.
        until_s: when it jumps again, or the room closes.
        before: true mean probability until then.
        after: true mean probability from then on.
    """

    at_s: float
    until_s: float
    before: float
    after: float


def time_to_react(jump: Jump, time_s: np.ndarray, predicted: np.ndarray) -> float:
    """Seconds from a jump until the mean prediction has covered half of it; infinite where it has not until the next.

    It has where the mean over a centred window of :data:`WINDOW_S` has moved by half of the true jump from what was
    predicted in the :data:`BEFORE_S` before; the windows stand :data:`STEP_S` apart, the first one at the jump.

    Args:
        jump: of the room.
        time_s: ``[n]``, ascending, of the room's exposures.
        predicted: ``[n]``, click probabilities.

    Raises:
        ValueError: there were no exposures before the jump.
    """
    first, stop = np.searchsorted(time_s, (jump.at_s - BEFORE_S, jump.at_s))
    if first == stop:
        raise ValueError(f"no exposures in the {BEFORE_S} s before the jump at {jump.at_s} s")
    target = predicted[first:stop].mean() + (jump.after - jump.before) / 2
    at_s = np.arange(jump.at_s, jump.until_s - WINDOW_S / 2, STEP_S)
    there = (running_mean(time_s, predicted, at_s, WINDOW_S) - target) * np.sign(jump.after - jump.before) >= 0
    return float(at_s[np.argmax(there)] - jump.at_s) if there.any() else float("inf")


def running_mean(time_s: np.ndarray, value: np.ndarray, at_s: np.ndarray, window_s: float) -> np.ndarray:
    """Mean of what lies within half a window of each moment, ``[m]`` float64; nan where nothing does.

    Args:
        time_s: ``[n]``, ascending.
        value: ``[n]``.
        at_s: ``[m]``, moments.
        window_s: its width; it holds its left edge only.
    """
    total = np.concatenate([[0.0], np.cumsum(value, dtype=np.float64)])
    first = np.searchsorted(time_s, at_s - window_s / 2)
    stop = np.searchsorted(time_s, at_s + window_s / 2)
    with np.errstate(invalid="ignore"):
        return (total[stop] - total[first]) / (stop - first)


def expected_calibration_error(predicted: np.ndarray, target: np.ndarray, bins: int = 20) -> float:
    """Mean over bins, of as many rows each by their prediction, of ``|mean prediction - mean target|``.

    Args:
        predicted: ``[n]``, probabilities.
        target: ``[n]``, labels or true probabilities.
        bins: their number.
    """
    order = np.argsort(predicted, kind="stable")
    gaps = [
        abs(float(predicted[rows].mean() - target[rows].mean())) * len(rows)
        for rows in np.array_split(order, bins)
        if len(rows)
    ]
    return sum(gaps) / len(order)


def excess_loss(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of predictions from true probabilities, ``[n]`` each: the avoidable log loss.

    Predictions are clipped to ``[1e-6, 1 - 1e-6]``.
    """
    p, q = np.clip(predicted.astype(np.float64), _EPSILON, 1 - _EPSILON), truth.astype(np.float64)
    return float((q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean())


def quality(user_id: np.ndarray, predicted: np.ndarray, label: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Metrics of a behaviour, ``[n]`` each, against labels and against true probabilities.

    Returns:
        ``auc``, ``gauc`` and those of the true probabilities, ``best_auc`` and ``best_gauc``; ``predicted_observed``
        and ``predicted_true``, ratios of means (the first is one over COPC); ``ece_observed`` and ``ece_true``, see
        :func:`expected_calibration_error`; ``excess_loss``, and that of the mean of the true probabilities,
        ``constant_excess_loss``. nan where undefined.
    """
    predicted, truth = predicted.astype(np.float64), truth.astype(np.float64)
    areas = {
        "auc": auc(predicted, label),
        "gauc": grouped_auc(user_id, predicted, label),
        "best_auc": auc(truth, label),
        "best_gauc": grouped_auc(user_id, truth, label),
    }
    return {
        **{name: float("nan") if area is None else area for name, area in areas.items()},
        "predicted_observed": float(predicted.sum() / max(label.sum(), 1)),
        "predicted_true": float(predicted.sum() / truth.sum()),
        "ece_observed": expected_calibration_error(predicted, label),
        "ece_true": expected_calibration_error(predicted, truth),
        "excess_loss": excess_loss(predicted, truth),
        "constant_excess_loss": excess_loss(np.full(len(truth), truth.mean()), truth),
    }
