"""Metrics of binary behaviours, with the same values on one process and on many.

Metrics of each behaviour over its unmasked rows:

=============== ================================================================================================
``auc``         P(score of a positive > score of a negative), ties counted half
``gauc``        mean over users with both classes of the user's own AUC, weighted by the user's rows
``uauc``        the same mean with every user weighted equally
``logloss``     mean of ``-log p`` of the true label; probabilities are clipped to [1.2e-7, 1 - 1.2e-7]
``calibration`` sum of probabilities divided by number of positives
``ne``          normalised entropy: logloss divided by the entropy of the base rate (He et al. 2014, section 2)
``positives``   number of positives
``rows``        number of rows
=============== ================================================================================================

An undefined metric (no row, one class only, no user with both classes) is ``None``, never 0 or 0.5.

`BehaviourMetrics` keeps every score and is exact; `ProgressiveMetrics` has a bounded size, for an endless stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of

Report = dict[str, dict[str, float | int | None]]
"""Behaviour -> metric -> value; ``None`` if undefined."""

_EPSILON = float(np.finfo(np.float32).eps)
_LOGIT_LIMIT = 16.0
_USER_BUCKETS = (1 << 31) - 1
_CHUNK_ROWS = 1 << 16


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Compute the ROC AUC of ``scores [n]`` against ``labels [n]`` (0 or 1); None if a class is absent."""
    positive = np.asarray(labels) > 0
    positives, negatives = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(positives) or not len(negatives):
        return None
    return _double_wins(positives, negatives) / (2 * len(positives) * len(negatives))


def user_auc(user_id: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the AUC of every user that has both classes.

    Args:
        user_id: ``[n] int64``, in any order.
        scores: ``[n] float``.
        labels: ``[n]``, 0 or 1.

    Returns:
        User ids ``[u] int64`` ascending, their AUC ``[u] float64`` and their number of rows ``[u] int64``.
    """
    return _user_areas(*np.unique(user_id, return_inverse=True), scores, labels)


def _user_areas(
    users: np.ndarray, number: np.ndarray, scores: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Do :func:`user_auc` for rows whose user is ``users[number]``, with ``users`` ascending and distinct."""
    positive = np.asarray(labels) > 0
    # Users without a positive have no AUC. For rare behaviours these are most users, so only the others are sorted.
    with_positive = np.zeros(len(users), bool)
    with_positive[number[positive]] = True
    rows = with_positive[number]
    # User, score and class as one whole number: to sort such numbers takes a tenth of the time of a sort by two keys.
    key = number[rows].astype(np.uint64) << np.uint64(33) | _ascending(scores[rows]) << np.uint64(1) | positive[rows]
    if not len(key):
        return users[:0].astype(np.int64), np.zeros(0), np.zeros(0, np.int64)
    key.sort()
    # First row of each group of equal scores of a user.
    ties = np.flatnonzero(np.append(True, (key[1:] ^ key[:-1]) > 1))
    tie_positives = np.add.reduceat((key & np.uint64(1)).astype(np.int64), ties)
    tie_negatives = np.diff(np.append(ties, len(key))) - tie_positives
    tie_number = (key[ties] >> np.uint64(33)).astype(np.int64)
    new_user = np.append(True, tie_number[1:] != tie_number[:-1])
    first = np.flatnonzero(new_user)
    negatives_before = np.cumsum(tie_negatives) - tie_negatives
    # Count from the user's own first row.
    negatives_before -= negatives_before[first][np.cumsum(new_user) - 1]
    # A positive wins against each lower negative and half against each tied one; doubled, so the sums are integers.
    wins = np.add.reduceat(tie_positives * (2 * negatives_before + tie_negatives), first)
    positives, negatives = np.add.reduceat(tie_positives, first), np.add.reduceat(tie_negatives, first)
    both = negatives > 0
    area = wins[both] / (2 * positives[both] * negatives[both])
    return users[tie_number[first]][both].astype(np.int64), area, (positives + negatives)[both]


def _ascending(scores: np.ndarray) -> np.ndarray:
    """Return whole numbers below ``2**32`` (uint64) in the order of the scores; equal scores have equal numbers."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint64)
    # Adding 0 turns -0 into 0. The bits of negative numbers descend.
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)


def grouped_auc(user_id: np.ndarray, scores: np.ndarray, labels: np.ndarray, *, weighted: bool = True) -> float | None:
    """Compute GAUC (``weighted`` by rows) or UAUC of ``[n]`` rows; None if no user has both classes."""
    _, area, rows = user_auc(user_id, scores, labels)
    return float(np.average(area, weights=rows if weighted else None)) if len(area) else None


def _double_wins(positives: np.ndarray, negatives: np.ndarray) -> int:
    """Count (positive, negative) pairs in the right order, times two so that a tie counts 1; both arrays are sorted."""
    left = np.searchsorted(negatives, positives, side="left").sum(dtype=np.int64)
    return int(left + np.searchsorted(negatives, positives, side="right").sum(dtype=np.int64))


def _summary(rows: float, positives: float, probability: float, loss: float) -> dict[str, float | int | None]:
    """Compute the metrics that are functions of four sums over rows."""
    rate = positives / rows if rows else 0.0
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) if 0 < rate < 1 else 0.0
    return {
        "logloss": loss / rows if rows else None,
        "calibration": probability / positives if positives else None,
        "ne": loss / rows / entropy if entropy else None,
        "positives": int(positives),
        "rows": int(rows),
    }


def _losses(probability: Tensor, label: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each element, float64."""
    clipped = probability.double().clamp(_EPSILON, 1 - _EPSILON)
    return -torch.where(label > 0, clipped, 1 - clipped).log()


def _refuse_not_finite(behaviour: str, probability_sum: float) -> None:
    if not math.isfinite(probability_sum):
        raise UserError(
            f"metrics: some predictions of {behaviour} are NaN or infinite; training diverged: lower the learning rates"
        )


def _user_bucket(user_id: np.ndarray | Tensor) -> np.ndarray:
    """Hash each user id into ``[0, 2**31 - 1)``.

    The modulus is prime, so a range of buckets has users of all partitions, whatever their number.
    """
    return partition_of(np.asarray(user_id), _USER_BUCKETS)


class _Ranks:
    """Collectives of the metrics on host memory; without a process group they work as on a single rank."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.alone = group is None or dist.get_world_size(group) == 1
        self.world = 1 if self.alone else dist.get_world_size(group)
        self.rank = 0 if self.alone else dist.get_rank(group)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """All-gather ``values``, which have the same shape on every rank, into ``[world, *shape]`` in rank order."""
        if self.alone:
            return values[None]
        local = torch.from_numpy(np.ascontiguousarray(values))
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local, group=self.group)
        return torch.stack(parts).numpy()

    def exchange(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Send ``counts[r]`` consecutive elements of ``values [n]`` to rank r. Returns what was received, by sender."""
        if self.alone:
            return values
        incoming = self.gather(counts.astype(np.int64))[:, self.rank]
        local = torch.from_numpy(np.ascontiguousarray(values))
        received = local.new_empty(int(incoming.sum()))
        dist.all_to_all_single(received, local, incoming.tolist(), counts.tolist(), group=self.group)
        return received.numpy()

    def auc(self, scores: np.ndarray, labels: np.ndarray) -> float | None:
        """Compute the exact AUC over the rows of all ranks, with about an equal share of the scores on each rank.

        Rank r receives the r-th range of score values, so equal scores are on the same rank. A positive wins against
        the lower negatives on its own rank, which are found by binary search, and against all negatives of lower
        ranks, which are counted.
        """
        sorted_classes = [np.sort(scores[labels > 0]), np.sort(scores[labels <= 0])]
        # A rank without rows contributes NaN, which is removed below.
        sample = np.full(16 * self.world, np.nan, scores.dtype)
        if len(scores):
            sample = np.quantile(scores, np.linspace(0, 1, len(sample)), method="nearest").astype(scores.dtype)
        # Quantiles of all ranks' samples split the score values into ranges of about equal size.
        samples = np.sort(self.gather(sample), axis=None)
        samples = samples[~np.isnan(samples)]
        if not len(samples):
            return None
        cuts = samples[np.arange(1, self.world) * len(samples) // self.world]
        received = []
        for values in sorted_classes:
            counts = np.diff(np.searchsorted(values, cuts), prepend=0, append=len(values))
            received.append(np.sort(self.exchange(values, counts)))
        counts = np.array([len(received[0]), len(received[1]), _double_wins(*received)], np.int64)
        positives, negatives, wins = self.gather(counts).T
        total = int(wins.sum()) + 2 * int((positives * (np.cumsum(negatives) - negatives)).sum())
        pairs = int(positives.sum()) * int(negatives.sum())
        return total / (2 * pairs) if pairs else None


_Columns = tuple[Tensor, Tensor, Tensor, Tensor]
"""Columns user_id, probability, label and mask of some rows."""


def _as_columns(columns: Iterable[Tensor]) -> _Columns:
    user_id, probability, label, mask = columns
    return user_id, probability, label, mask


class BehaviourMetrics:
    """Exact metrics of K behaviours over all rows of all ranks, in 8 + 6 K bytes of main memory per row.

    All rows of a user must be added on the same rank, which is true if the data is partitioned by user.
    """

    def __init__(self, behaviours: Sequence[str]) -> None:
        self.behaviours = tuple(behaviours)
        self._batches: list[_Columns] = []

    def update(self, user_id: Tensor, probability: Tensor, label: Tensor, mask: Tensor) -> None:
        """Add rows.

        Args:
            user_id: ``[B] int64``.
            probability: ``[B, K]`` in [0, 1], kept as float32.
            label: ``[B, K]``, 0 or 1.
            mask: ``[B, K]``; a row with 0 does not count for that behaviour.
        """
        columns = (user_id, probability.float(), label.to(torch.uint8), mask.to(torch.uint8))
        batches = self._batches
        batches.append(_as_columns(column.detach().cpu() for column in columns))
        # Merge small batches pairwise as they come, because thousands of tiny tensors need more memory than their rows.
        while len(batches) > 1 and len(batches[-2][0]) < _CHUNK_ROWS and len(batches[-1][0]) >= len(batches[-2][0]):
            last = batches.pop()
            batches[-1] = _as_columns(torch.cat(pair) for pair in zip(batches[-1], last, strict=True))

    def compute(self, group: dist.ProcessGroup | None = None) -> Report:
        """Compute the metrics over all ranks of a group, the same on every rank. Collective.

        Args:
            group: a group for tensors on the CPU, such as ``World.control``; None for the rows of this process alone.

        Raises:
            UserError: a prediction is NaN or infinite; raised on every rank.
        """
        ranks = _Ranks(group)
        user_id, probability, label, mask = self._columns()
        report: Report = {}
        for k, behaviour in enumerate(self.behaviours):
            kept = mask[:, k] > 0
            users, scores, labels = user_id[kept].numpy(), probability[kept, k], label[kept, k]
            _, area, weight = user_auc(users, scores.numpy(), labels.numpy())
            sums = [len(users), int(labels.sum()), float(scores.double().sum()), float(_losses(scores, labels).sum())]
            sums += [float(area @ weight), float(weight.sum()), float(area.sum()), len(area)]
            *totals, weighted, weights, unweighted, users_counted = ranks.gather(np.array(sums)).sum(axis=0).tolist()
            _refuse_not_finite(behaviour, totals[2])
            report[behaviour] = {
                "auc": ranks.auc(scores.numpy(), labels.numpy()),
                "gauc": weighted / weights if weights else None,
                "uauc": unweighted / users_counted if users_counted else None,
                **_summary(*totals),
            }
        return report

    @property
    def rows(self) -> int:
        """Number of rows on this rank."""
        return sum(len(batch[0]) for batch in self._batches)

    def keep_users(self, limit: int) -> None:
        """Keep only the rows of users whose hash bucket is below ``limit``; buckets are in ``[0, 2**31 - 1)``."""
        kept = torch.from_numpy(_user_bucket(self._columns()[0]) < limit)
        self._batches = [_as_columns(column[kept] for column in self._columns())]

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's rows as four tensors."""
        return dict(zip(("user_id", "probability", "label", "mask"), self._columns(), strict=True))

    def load_state_dict(self, *states: dict[str, Tensor]) -> None:
        """Replace the rows by those of ``states``: one state, or several if there are fewer ranks than at the save."""
        self._batches = [(state["user_id"], state["probability"], state["label"], state["mask"]) for state in states]

    def _columns(self) -> _Columns:
        if len(self._batches) != 1:
            none = torch.zeros(0, len(self.behaviours))
            empty = (torch.zeros(0, dtype=torch.int64), none, none.to(torch.uint8), none.to(torch.uint8))
            self._batches = [_as_columns(torch.cat(parts) for parts in zip(empty, *self._batches, strict=True))]
        return self._batches[0]


class ProgressiveMetrics:
    """Metrics of `BehaviourMetrics` over an endless stream in bounded memory; metrics from sums and counts are exact.

    AUC is computed from a histogram of the logit with ``bins`` equal bins in [-16, 16], 0.002 wide by default. Its
    error is at most half the share of (positive, negative) pairs in the same bin, see ``resolution()``.

    GAUC and UAUC are exact until a rank has seen ``sampled_rows`` rows. From then on they are computed on a sample of
    users, chosen by a hash of the id; the sample is halved whenever it would have more rows. All ranks together report
    on at most ``sampled_rows`` rows, of the same users at any number of ranks.

    Memory and state: ``16 K bins + (8 + 6 K) sampled_rows`` bytes.
    """

    def __init__(self, behaviours: Sequence[str], *, bins: int = 16384, sampled_rows: int = 1 << 18) -> None:
        self.behaviours = tuple(behaviours)
        self.bins = bins
        self.sampled_rows = sampled_rows
        self.load_state_dict()

    def update(self, user_id: Tensor, probability: Tensor, label: Tensor, mask: Tensor) -> None:
        """Add rows; arguments as of `BehaviourMetrics.update`."""
        user_id, probability = user_id.detach().cpu(), probability.detach().float().cpu()
        label, mask = label.detach().cpu() > 0, mask.detach().cpu() > 0
        # A NaN remains in the sums, where compute() detects it; in the histogram it needs some bin.
        logit = torch.logit(torch.nan_to_num(probability), _EPSILON)
        place = ((logit + _LOGIT_LIMIT) * (self.bins / (2 * _LOGIT_LIMIT))).long().clamp(0, self.bins - 1)
        # The histograms of all behaviours and classes are laid out one after another, so one bincount fills them all.
        place += (label.long() + 2 * torch.arange(len(self.behaviours))) * self.bins
        self._histogram += torch.bincount(place[mask], minlength=self._histogram.numel()).view_as(self._histogram)
        self._probability += torch.where(mask, probability, 0).double().sum(0)
        self._loss += torch.where(mask, _losses(probability, label), 0).sum(0)
        kept = torch.from_numpy(_user_bucket(user_id) < self._user_limit)
        self._sample.update(user_id[kept], probability[kept], label[kept], mask[kept])
        while self._sample.rows > self.sampled_rows:
            self._user_limit //= 2
            self._sample.keep_users(self._user_limit)

    def compute(self, group: dist.ProcessGroup | None = None) -> Report:
        """Compute the metrics over all ranks of a group, the same on every rank. Collective.

        Args:
            group: a group for tensors on the CPU, such as ``World.control``; None for the rows of this process alone.

        Raises:
            UserError: a prediction is NaN or infinite; raised on every rank.
        """
        ranks = _Ranks(group)
        histogram = ranks.gather(self._histogram.numpy()).sum(axis=0)
        sums = ranks.gather(np.stack([self._probability.numpy(), self._loss.numpy()])).sum(axis=0)
        user_id, probability, label, mask = self._shared_sample(ranks)
        users, number = np.unique(user_id, return_inverse=True)
        report: Report = {}
        for k, behaviour in enumerate(self.behaviours):
            _refuse_not_finite(behaviour, sums[0, k])
            negatives, positives = histogram[k]
            double_wins = int((positives * (2 * (np.cumsum(negatives) - negatives) + negatives)).sum())
            pairs = int(positives.sum()) * int(negatives.sum())
            kept = mask[:, k] > 0
            _, area, weight = _user_areas(users, number[kept], probability[kept, k], label[kept, k])
            report[behaviour] = {
                "auc": double_wins / (2 * pairs) if pairs else None,
                "gauc": float(np.average(area, weights=weight)) if len(area) else None,
                "uauc": float(area.mean()) if len(area) else None,
                **_summary(float(histogram[k].sum()), float(positives.sum()), sums[0, k], sums[1, k]),
            }
        return report

    def resolution(self) -> dict[str, float | None]:
        """Return the largest possible error of this rank's AUC for each behaviour; None if the AUC is undefined."""
        negatives, positives = self._histogram.double().unbind(1)
        pairs, tied = positives.sum(1) * negatives.sum(1), (positives * negatives).sum(1)
        shares = zip(self.behaviours, tied.tolist(), pairs.tolist(), strict=True)
        return {behaviour: part / (2 * whole) if whole else None for behaviour, part, whole in shares}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's histograms, sums and sampled rows, as tensors and one integer."""
        return {
            "histogram": self._histogram.clone(),
            "probability": self._probability.clone(),
            "loss": self._loss.clone(),
            "user_limit": self._user_limit,
            "sample": self._sample.state_dict(),
        }

    def load_state_dict(self, *states: dict[str, Any]) -> None:
        """Replace the state by the sum of ``states``.

        If the number of ranks has changed, give each saved state to exactly one of the new ranks, in any order; a rank
        without a state starts empty.
        """
        behaviours = len(self.behaviours)
        self._histogram = torch.zeros(behaviours, 2, self.bins, dtype=torch.int64)  # class 0 is negative
        self._probability = torch.zeros(behaviours, dtype=torch.float64)
        self._loss = torch.zeros(behaviours, dtype=torch.float64)
        # A saved sample lacks the users above its own limit, so the merged sample uses the lowest limit of all.
        self._user_limit = min((state["user_limit"] for state in states), default=_USER_BUCKETS)
        self._sample = BehaviourMetrics(self.behaviours)
        self._sample.load_state_dict(*(state["sample"] for state in states))
        self._sample.keep_users(self._user_limit)
        for state in states:
            self._histogram += state["histogram"]
            self._probability += state["probability"]
            self._loss += state["loss"]

    def _shared_sample(self, ranks: _Ranks) -> tuple[np.ndarray, ...]:
        """Gather the rows of users below one common limit from all ranks; columns as in `BehaviourMetrics`."""
        columns = [column.numpy() for column in self._sample.state_dict().values()]
        buckets = _user_bucket(columns[0])
        # Take the largest of these limits, each half of the one before, with which the rows of all ranks together fit.
        limits = int(ranks.gather(np.array([self._user_limit])).min()) >> np.arange(32)
        rows = ranks.gather(np.searchsorted(np.sort(buckets), limits)).sum(axis=0)
        kept = buckets < limits[np.argmax(rows <= self.sampled_rows)]
        counts = ranks.gather(np.array([kept.sum()]))[:, 0]
        shared = []
        for column in columns:
            padded = np.zeros((counts.max(), *column.shape[1:]), column.dtype)
            padded[: kept.sum()] = column[kept]
            parts = zip(ranks.gather(padded), counts, strict=True)
            shared.append(np.concatenate([part[:count] for part, count in parts]))
        return tuple(shared)
