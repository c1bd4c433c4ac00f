"""Metrics of predicted seconds in the comment area.

An undefined metric (no row, no pair with different labels, no user with both classes) is ``None``, never 0 or 0.5.
Equal scores are never ordered by the order of the rows: a tied pair counts half, and a metric of a list is the mean
over all orders of its ties.

============ ========================================================================================================
``rmse``     root of the mean squared error, seconds, over all rows
``mae``      mean absolute error, seconds, over all rows
``rmse_opened``, ``mae_opened``  the same over rows whose comment area was opened
``bias``     mean of the predictions divided by the mean of the stays
``xauc``     share of pairs in the right order among all pairs of rows with different stays
``gauc``     mean over users of the AUC of opening, weighted by the user's rows; users with both classes only
``uauc``     the same mean with every such user weighted equally
``ndcg@k``   mean over users who opened at least once of DCG@k of opening, gain 1, discount log2(rank + 1)
``mrr``      mean over the same users of the reciprocal rank of the first opened row
``wt@k``     mean over all users of the seconds stayed in the k top-ranked rows
============ ========================================================================================================

A list is all rows of a user in the held-out range. :func:`released_metrics` has the definitions of LCU's released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.metrics.behaviour_metrics import auc, grouped_auc

Values = dict[str, float | int | None]
"""Metric -> value, ``None`` if undefined."""

EXPOSURE_GROUPS: tuple[tuple[str, int, int], ...] = (
    ("0", 0, 0),
    ("1-5", 1, 5),
    ("6-50", 6, 50),
    ("more", 51, np.iinfo(np.int64).max),
)
"""Groups of videos by their number of visits in the training range: name, minimum, maximum."""

RANKS: tuple[int, ...] = (1, 3, 5)


def staytime_metrics(user_id: np.ndarray, seconds: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> Values:
    """Compute all metrics of some rows.

    Args:
        user_id: ``[n]`` int64.
        seconds: ``[n]`` float, true stays in seconds; 0 if the comments were not opened.
        predicted: ``[n]`` float, predicted seconds.
        score: ``[n]`` float, ranking score of a user's rows; usually ``predicted``.
    """
    return {
        **regression_metrics(seconds, predicted),
        "xauc": xauc(seconds, predicted),
        **list_metrics(user_id, seconds, score),
        "rows": len(seconds),
        "opened": int((seconds > 0).sum()),
    }


def metrics_by_exposure(
    exposures: np.ndarray, user_id: np.ndarray, seconds: np.ndarray, predicted: np.ndarray, score: np.ndarray
) -> dict[str, Values]:
    """Compute :func:`staytime_metrics` of each of :data:`EXPOSURE_GROUPS`.

    ``exposures [n]`` is the number of training visits to each row's video.
    """
    groups = {}
    for name, least, most in EXPOSURE_GROUPS:
        inside = (exposures >= least) & (exposures <= most)
        groups[name] = staytime_metrics(user_id[inside], seconds[inside], predicted[inside], score[inside])
    return groups


def regression_metrics(seconds: np.ndarray, predicted: np.ndarray) -> Values:
    """Compute ``rmse`` and ``mae``, both over all rows and over opened rows, and ``bias``."""
    error, opened = predicted.astype(np.float64) - seconds, seconds > 0
    values: Values = {}
    for suffix, rows in (("", np.ones(len(seconds), bool)), ("_opened", opened)):
        some = bool(rows.any())
        values[f"rmse{suffix}"] = float(np.sqrt(np.square(error[rows]).mean())) if some else None
        values[f"mae{suffix}"] = float(np.abs(error[rows]).mean()) if some else None
    stayed = float(seconds.sum(dtype=np.float64))
    values["bias"] = float(predicted.sum(dtype=np.float64)) / stayed if stayed else None
    return values


def xauc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Compute the share of pairs with different labels that the scores order correctly, ties half, in O(n log n).

    Args:
        labels: ``[n]``, any ordered type.
        scores: ``[n]`` float.
    """
    n = len(labels)
    label, rank = _dense(labels), _dense(scores)
    both = _pairs(label * (int(rank.max(initial=0)) + 1) + rank)
    pairs = n * (n - 1) // 2 - _pairs(label)
    if not pairs:
        return None
    # Sort equal labels by descending score, so that pairs with equal labels are never counted as ascending.
    right = _ascending_pairs(rank[np.lexsort((-rank, label))])
    return (2 * right + _pairs(rank) - both) / (2 * pairs)


def list_metrics(user_id: np.ndarray, seconds: np.ndarray, score: np.ndarray) -> Values:
    """Compute ``gauc``, ``uauc``, ``ndcg@k``, ``mrr`` and ``wt@k``."""
    opened = seconds > 0
    lists = _Lists(user_id, score)
    # Every row of a tie gets the tie's mean, which is the expected value over all orders of the tie.
    gain, stayed = lists.tied_mean(opened), lists.tied_mean(seconds)
    positives = lists.sum(lists.of(opened))
    counted = positives > 0
    values: Values = {
        "gauc": grouped_auc(user_id, score, opened),
        "uauc": grouped_auc(user_id, score, opened, weighted=False),
    }
    discount = 1 / np.log2(lists.rank + 2)
    for k in RANKS:
        dcg = lists.sum(gain * discount * (lists.rank < k))
        best = np.cumsum(1 / np.log2(np.arange(k) + 2))
        ndcg = dcg[counted] / best[np.minimum(positives[counted].astype(np.int64), k) - 1]
        values[f"ndcg@{k}"] = _mean(ndcg)
    values["mrr"] = _mean(lists.reciprocal_ranks(opened)[counted])
    for k in RANKS:
        values[f"wt@{k}"] = _mean(lists.sum(stayed * (lists.rank < k)))
    return values


def released_metrics(user_id: np.ndarray, seconds: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> Values:
    """Compute ``gauc``, ``xauc``, ``ndcg@k`` and ``mrr`` as LCU's released code defines them, for comparison.

    ``gauc`` is one AUC over all users. In ``xauc``, pairs with equal labels count as correct, so constant labels give
    1. Users who opened nothing count as 0 in the means over users.
    """
    opened = seconds > 0
    n = len(seconds)
    pairs, equal = n * (n - 1) // 2, _pairs(_dense(seconds))
    ordered = xauc(seconds, predicted)
    proper = list_metrics(user_id, seconds, score)
    users = len(np.unique(user_id))
    share = len(np.unique(user_id[opened])) / users if users else 0.0
    return {
        "gauc": auc(score, opened),
        "xauc": ((ordered or 0.0) * (pairs - equal) + equal) / pairs if pairs else None,
        **{name: share * (proper[name] or 0.0) for name in (*(f"ndcg@{k}" for k in RANKS), "mrr")},
    }


def comment_metrics(
    scores: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], present: np.ndarray
) -> dict[str, Values]:
    """Measure how well each head ranks the comments of a row.

    Args:
        scores: head -> ``[n, comments]``, predicted scores.
        truth: head -> ``[n, comments]``, values of the true ranking.
        present: ``[n, comments]`` bool, False for padding.

    Returns:
        ``{head: {"auc", "rows"}}``. ``auc`` is the share of pairs with different truth that are in the right order,
        averaged over the rows with such a pair; ``rows`` is the number of these rows.
    """
    return {head: _row_order(scores[head], truth[head], present) for head in scores}


def _row_order(scores: np.ndarray, truth: np.ndarray, present: np.ndarray) -> Values:
    greater = truth[:, :, None] > truth[:, None, :]
    pairs = greater & present[:, :, None] & present[:, None, :]
    difference = scores[:, :, None] - scores[:, None, :]
    right = ((difference > 0) + 0.5 * (difference == 0)) * pairs
    count = pairs.sum((1, 2))
    some = count > 0
    return {"auc": _mean(right.sum((1, 2))[some] / count[some]), "rows": int(some.sum())}


class _Lists:
    """Rows sorted by user, then by descending score; equal scores of a user form a tie.

    Attributes:
        rank: ``[n]`` int64, position in the user's list, from 0.
    """

    def __init__(self, user_id: np.ndarray, score: np.ndarray) -> None:
        self._order = np.lexsort((-score, user_id))
        user, score = user_id[self._order], score[self._order]
        new = np.append(True, user[1:] != user[:-1])[: len(user)]
        self._first = np.flatnonzero(new)
        self._user = np.cumsum(new) - 1
        self.rank = np.arange(len(user)) - self._first[self._user]
        self._tie = np.cumsum(new | np.append(True, score[1:] != score[:-1])[: len(user)]) - 1

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return ``values [n]`` of the rows in the order of the lists."""
        return values[self._order]

    def sum(self, ordered: np.ndarray) -> np.ndarray:
        """Sum ``[n]`` values in the order of the lists over each user, ``[users]``."""
        return np.bincount(self._user, ordered, len(self._first))

    def tied_mean(self, values: np.ndarray) -> np.ndarray:
        """Return ``values [n]`` in the order of the lists, each replaced by the mean over its tie."""
        ordered, size = self.of(values), np.bincount(self._tie)
        return (np.bincount(self._tie, ordered, len(size)) / np.maximum(size, 1))[self._tie]

    def reciprocal_ranks(self, positive: np.ndarray) -> np.ndarray:
        """Compute the reciprocal rank of each user's first positive, averaged over the orders of its tie, ``[users]``.

        It is 0 for users without a positive.
        """
        hit = self.of(positive) > 0
        found = np.zeros(len(self._first))
        place = np.flatnonzero(hit)
        users, at = np.unique(self._user[place], return_index=True)
        size, hits = np.bincount(self._tie), np.bincount(self._tie, hit)
        start = np.searchsorted(self._tie, np.arange(len(size)))
        for user, tie in zip(users, self._tie[place[at]], strict=True):
            found[user] = _first_of_tie(int(self.rank[start[tie]]) + 1, int(size[tie]), int(hits[tie]))
        return found


def _first_of_tie(rank: int, size: int, hits: int) -> float:
    """Compute the mean reciprocal rank of the first hit over all orders of a tie.

    Args:
        rank: rank of the tie's first row, from 1.
        size: number of rows in the tie.
        hits: number of positives among them.
    """
    ahead = np.arange(size - hits + 1)
    # Probability that the next row is a hit, given that the ``ahead`` rows before it were misses.
    share = hits / (size - ahead)
    first = share * np.append(1.0, np.cumprod(1 - share)[:-1])
    return float((first / (rank + ahead)).sum())


def _ascending_pairs(values: np.ndarray) -> int:
    """Count pairs ``i < j`` with ``values[i] < values[j]``; ``values [n]`` are integers of at least 0.

    The highest bit in which two numbers differ decides their order. Bits are processed from the highest down. For each
    bit, numbers with the same higher bits are adjacent and in their original order: among them, pairs with a 0 before a
    1 are counted, then the zeros are moved to the front (stable radix sort).
    """
    total = 0
    for bit in reversed(range(int(values.max(initial=0)).bit_length())):
        above, one = values >> (bit + 1), (values >> bit) & 1
        first = np.flatnonzero(np.append(True, above[1:] != above[:-1]))
        size = np.diff(np.append(first, len(values)))
        start, zeros = np.repeat(first, size), np.repeat(np.add.reduceat(1 - one, first), size)
        zeros_before = np.cumsum(1 - one) - (1 - one)
        zeros_before -= zeros_before[start]
        total += int((zeros_before * one).sum())
        ones_before = np.arange(len(values)) - start - zeros_before
        sorted_values = np.empty_like(values)
        sorted_values[start + np.where(one, zeros + ones_before, zeros_before)] = values
        values = sorted_values
    return total


def _dense(values: np.ndarray) -> np.ndarray:
    """Return dense ranks from 0; equal values have the same rank."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _pairs(codes: np.ndarray) -> int:
    """Count pairs with equal codes."""
    # Python integers, because the number of pairs may overflow int64.
    count = np.unique(codes, return_counts=True)[1].astype(object)
    return int((count * (count - 1) // 2).sum()) if len(count) else 0


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
