"""Distances of predictions to the true probabilities, and times to follow their jumps, for :mod:`benchmarks.moment`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.metrics.behaviour_metrics import auc, grouped_auc

WINDOW_S = 30.0
"""Seconds of the centred window over which exposures are averaged: half of it lies after the moment."""

STEP_S = 5.0
BEFORE_S = 60.0
"""Seconds before a jump over which predictions are averaged."""

_EPSILON = 1e-6


@dataclass(frozen=True)
class Jump:
    """A jump of the click probability of a room.

    Attributes:
        at_s: time of the jump.
        until_s: time of the next jump, or of the room's closing.
        before: true mean probability until then.
        after: true mean probability from then on.
    """

    at_s: float
    until_s: float
    before: float
    after: float


def time_to_react(jump: Jump, time_s: np.ndarray, predicted: np.ndarray) -> float:
    """Return the seconds until the mean prediction has covered half of a jump; infinite if the next jump comes first.

    The mean over a centred window of :data:`WINDOW_S` must move by half of the true jump from the mean prediction of
    the :data:`BEFORE_S` before it. Windows are :data:`STEP_S` apart, the first one at the jump.

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
    """Return the mean of the values within half a window of each moment, ``[m]`` float64; nan without any value.

    Args:
        time_s: ``[n]``, ascending.
        value: ``[n]``.
        at_s: ``[m]``, moments.
        window_s: width of the window, which includes its left edge only.
    """
    total = np.concatenate([[0.0], np.cumsum(value, dtype=np.float64)])
    first = np.searchsorted(time_s, at_s - window_s / 2)
    stop = np.searchsorted(time_s, at_s + window_s / 2)
    with np.errstate(invalid="ignore"):
        return (total[stop] - total[first]) / (stop - first)


def expected_calibration_error(predicted: np.ndarray, target: np.ndarray, bins: int = 20) -> float:
    """Return the mean of ``|mean prediction - mean target|`` over bins of equally many rows, ordered by prediction.

    Args:
        predicted: ``[n]``, probabilities.
        target: ``[n]``, labels or true probabilities.
        bins: number of bins.
    """
    order = np.argsort(predicted, kind="stable")
    gaps = [
        abs(float(predicted[rows].mean() - target[rows].mean())) * len(rows)
        for rows in np.array_split(order, bins)
        if len(rows)
    ]
    return sum(gaps) / len(order)


def excess_loss(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Return the avoidable log loss: the mean Kullback-Leibler divergence of predictions from the truth, ``[n]`` each.

    Predictions are clipped to ``[1e-6, 1 - 1e-6]``.
    """
    p, q = np.clip(predicted.astype(np.float64), _EPSILON, 1 - _EPSILON), truth.astype(np.float64)
    return float((q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean())


def quality(user_id: np.ndarray, predicted: np.ndarray, label: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the metrics of a behaviour, ``[n]`` each, against labels and against true probabilities.

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
