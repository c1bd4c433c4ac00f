"""Corrections of a ranker's log-odds by further columns, fitted on other users than those that they are used for.

A correction is a logistic regression on the log-odds and the columns, with a small ridge penalty on their standardised
values. Users are in ``FOLDS`` parts by a hash of their ids. The rows of a part are predicted by a regression on the
rows of the other parts, so no row is predicted by what was learnt from its own user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from trainer.data.format.schema import partition_of

FOLDS = 5
LEAST = 20
"""Fewest positives, and fewest negatives, of a behaviour whose gap is measured."""

_CLIP = 1e-7


def folds_of(user_id: np.ndarray) -> np.ndarray:
    """Return the part of each row, ``[n] int64`` in 0 to ``FOLDS`` - 1; all rows of a user are in one part."""
    return partition_of(user_id, FOLDS)


def reason_to_skip(label: np.ndarray, fold: np.ndarray) -> str | None:
    """Return why nothing can be measured for a behaviour, or None if it can.

    Args:
        label: ``[n]``, 0 or 1.
        fold: ``[n]`` parts.
    """
    positives, negatives = int(label.sum()), int(len(label) - label.sum())
    if min(positives, negatives) < LEAST:
        return f"{positives:,} positives and {negatives:,} negatives; {LEAST} of each are needed"
    if any(len(np.unique(label[fold != part])) < 2 for part in range(FOLDS)):
        return f"all positives, or all negatives, are of users in one of {FOLDS} parts"
    return None


def log_odds_of(probability: np.ndarray) -> np.ndarray:
    """Return the log-odds of probabilities, float64; 0 and 1 become finite."""
    clipped = np.clip(probability.astype(np.float64), _CLIP, 1 - _CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def log_loss(log_odds: np.ndarray, label: np.ndarray) -> float:
    """Return the mean negative log-likelihood of labels ``[n]`` in nats."""
    return float(np.mean(np.logaddexp(0, np.where(label > 0, -log_odds, log_odds))))


def cross_fit(columns: Sequence[np.ndarray], label: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Return held-out log-odds of a logistic regression on columns, ``[n]`` float64.

    Args:
        columns: ``[n]`` each; at least one.
        label: ``[n]``, 0 or 1; both are in every training part.
        fold: ``[n]`` parts of the rows.
    """
    inputs = np.stack(columns, axis=1).astype(np.float64)
    found = np.empty(len(label))
    for part in np.unique(fold):
        held_out = fold == part
        known = inputs[~held_out]
        mean, spread = known.mean(axis=0), known.std(axis=0)
        # A column that does not vary says nothing.
        scale = np.where(spread > 0, spread, np.inf)
        model = LogisticRegression(C=1.0, solver="newton-cholesky").fit((known - mean) / scale, label[~held_out])
        found[held_out] = model.decision_function((inputs[held_out] - mean) / scale)
    return found


def greedy_order(
    runs: Sequence[np.ndarray], terms: Mapping[str, np.ndarray], label: np.ndarray, fold: np.ndarray
) -> list[str]:
    """Return the terms that help, in the order of forward selection by the score test.

    The next term is the one with the largest score statistic of the held-out residuals. The order ends where it does
    not lower the held-out log loss.

    Args:
        runs: log-odds ``[n]`` of each run; statistics and log loss are means over the runs.
        terms: ``[n]`` by name.
        label: ``[n]``, 0 or 1.
        fold: ``[n]`` parts.
    """
    order: list[str] = []
    found = [cross_fit([run], label, fold) for run in runs]
    while len(order) < len(terms):
        chosen, rest = [terms[name] for name in order], [name for name in terms if name not in order]
        statistics = [
            score_statistics([run, *chosen], [terms[name] for name in rest], one, label)
            for run, one in zip(runs, found, strict=True)
        ]
        name = rest[int(np.argmax(np.mean(statistics, axis=0)))]
        after = [cross_fit([run, *chosen, terms[name]], label, fold) for run in runs]
        if np.mean([log_loss(one, label) for one in after]) >= np.mean([log_loss(one, label) for one in found]):
            break
        order.append(name)
        found = after
    return order


def score_statistics(
    columns: Sequence[np.ndarray], candidates: Sequence[np.ndarray], log_odds: np.ndarray, label: np.ndarray
) -> np.ndarray:
    """Return Rao's score statistic of each candidate beside the columns of a logistic regression.

    It is about twice the log-likelihood that the candidate would add.

    Args:
        columns: ``[n]`` each, without the constant one.
        candidates: ``[n]`` each.
        log_odds: ``[n]`` of the regression.
        label: ``[n]``, 0 or 1.
    """
    probability = 1 / (1 + np.exp(-log_odds))
    root = np.sqrt(probability * (1 - probability))
    basis = np.linalg.qr(np.stack([np.ones(len(label)), *columns], axis=1) * root[:, None])[0]
    found = []
    for candidate in candidates:
        weighted = candidate * root
        # The part of the candidate that the columns do not explain.
        rest = weighted - basis @ (basis.T @ weighted)
        information = rest @ rest
        known = information <= 1e-9 * (weighted @ weighted)
        found.append(0.0 if known else (rest @ ((label - probability) / root)) ** 2 / information)
    return np.array(found)
