"""Calibration of the scores of answer options, fitted on tuning samples.

The score of an answer is the log-probability of its text after the prompt. Two things make it a bad logit of a choice.
It is summed over tokens that the model takes for more certain than they are, so differences are too large. And it has
what the text is worth by itself: a frequent phrase is probable for every user. Where a sample has its prompt without
what is known of the user (``bare_prompt``), the score after that prompt is what the text has by itself, and

    logit = scale x score - bare x bare_score

With ``scale = bare = 1`` it is the pointwise mutual information of the answer and the user's history, with ``bare = 0``
a plain temperature. Both numbers are fitted by the log loss of the choices among tuning samples, which is convex in
them; ``scale = bare = 0`` is a choice by chance, so on the tuning samples the loss is never above chance.

Sources: domain-conditional pointwise mutual information, Holtzman et al. (EMNLP 2021); calibration by a context without
content, Zhao et al. (ICML 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEPS, _HALVINGS = 100, 40
_PENALTY = 1e-4
"""Weight of the squared numbers in the fit: keeps them finite if every tuning sample is answered right."""


@dataclass(frozen=True)
class Calibration:
    """Calibration of a task.

    Attributes:
        scale: factor of an option's score.
        bare: factor of its score without what is known of the user; 0 if the task's samples have no such prompt.
        samples: number of tuning samples that it was fitted on.
    """

    scale: float
    bare: float
    samples: int

    def logits(self, scores: np.ndarray, bare_scores: np.ndarray | None) -> np.ndarray:
        """Return calibrated logits ``[options]``; ``bare_scores`` is None if the sample has no bare prompt."""
        return self.scale * scores - (0.0 if bare_scores is None else self.bare * bare_scores)


def fit_calibration(
    scores: Sequence[np.ndarray], bare_scores: Sequence[np.ndarray | None], answers: Sequence[int]
) -> Calibration:
    """Fit the calibration of a task by Newton's method with halved steps.

    Args:
        scores: scores ``[options]`` of each tuning sample, at least one.
        bare_scores: the same after the bare prompts; only if all samples have them, ``bare`` is fitted.
        answers: place of the right option of each sample.
    """
    columns = [[value] if bare is None else [value, -bare] for value, bare in zip(scores, bare_scores, strict=True)]
    least = min(map(len, columns))
    features = [np.stack(of_sample[:least], 1) for of_sample in columns]
    weights = np.zeros(least)
    loss, gradient, curvature = _loss(features, answers, weights)
    for _ in range(_STEPS):
        step = np.linalg.solve(curvature, gradient)
        for halved in range(_HALVINGS):
            tried = weights - step / 2**halved
            next_loss, next_gradient, next_curvature = _loss(features, answers, tried)
            if next_loss < loss:
                break
        else:
            break
        weights, loss, gradient, curvature = tried, next_loss, next_gradient, next_curvature
    scale, bare = (float(weights[0]), float(weights[1]) if least > 1 else 0.0)
    return Calibration(scale, bare, len(features))


def _loss(
    features: Sequence[np.ndarray], answers: Sequence[int], weights: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the penalised mean log loss of the choices, its gradient and its second derivatives."""
    loss = _PENALTY * float(weights @ weights)
    gradient, curvature = 2 * _PENALTY * weights, 2 * _PENALTY * np.eye(len(weights))
    for options, answer in zip(features, answers, strict=True):
        logits = options @ weights
        likely = np.exp(logits - logits.max())
        total = likely.sum()
        likely /= total
        mean = likely @ options
        centred = options - mean
        loss += (logits.max() + np.log(total) - logits[answer]) / len(features)
        gradient = gradient + (mean - options[answer]) / len(features)
        curvature = curvature + (centred * likely[:, None]).T @ centred / len(features)
    return loss, gradient, curvature
