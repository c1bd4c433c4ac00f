"""Six base losses for seconds of stay: the training target, the loss, and the way back from logits to seconds.

=========== ======================================= ============================== ==================================
base        logits                                  loss of a row                  seconds
=========== ======================================= ============================== ==================================
``vr``      seconds                                 squared error                  the logit
``wlr``     odds of seconds; odds of an opening     log loss weighted by seconds,  ``odds (1 - P(open))``
                                                    plus a plain log loss
``d2q``     share of stays that are no longer       squared error                  that quantile of the duration group
``ndt``     normalised dwell time                   squared error                  the inverse of the transform
``pcr``     seconds over the duration               squared error                  the logit times the duration
``tpm``     one for each node of a binary tree      log loss along the path        mean of the leaves
=========== ======================================= ============================== ==================================

Squared errors are divided by the target's variance in training, so the weight of another loss has the same meaning for
every base. Everything fitted comes from training rows and is kept in ``facts``, which a run writes to disk. No
prediction exceeds the longest stay of training.

Sources: WLR, Covington et al. (RecSys 2016); D2Q, Zhan et al. (KDD 2022); NDT, Xie et al. (WWW 2023); TPM, Lin et al.
(KDD 2023), without its two regularisers of the path's likelihood.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.choices import BaseKind

NDT_CEILING, NDT_SCALE_S, NDT_SHIFT = 2.319, 20.0, 0.744
"""Constants of ``ceiling / (1 + exp(-(seconds - offset) / scale)) - shift`` in LCU's released code."""

QUANTILES = 200
"""Number of quantiles that D2Q stores of the stays above zero of a duration group."""

_MOST_LOGIT = 20.0
"""Largest logit of WLR that is turned into odds: ``exp`` of a larger one could overflow."""


class BaseLoss(nn.Module, ABC):
    """Interface of the base losses.

    Attributes:
        outputs: number of logits of a row.
        facts: fitted values, as plain Python values.
        start: ``[outputs]`` float32, logits that predict the average of the training rows.
        limit: longest stay of training, in seconds.
    """

    start: Tensor

    def __init__(self, start: np.ndarray, limit: float, facts: dict[str, Any]) -> None:
        super().__init__()
        self.outputs = len(start)
        self.limit = limit
        self.facts = {**facts, "limit": limit}
        self.register_buffer("start", torch.as_tensor(start, dtype=torch.float32))

    @abstractmethod
    def loss(self, logits: Tensor, seconds: Tensor, duration: Tensor) -> Tensor:
        """Return the loss of each row.

        Args:
            logits: ``[batch, outputs]``.
            seconds: ``[batch]`` float, the true stay; 0 if the comments were not opened.
            duration: ``[batch]`` float, seconds of the video; 0 if unknown.

        Returns:
            ``[batch]``.
        """

    def seconds(self, logits: Tensor, duration: Tensor) -> Tensor:
        """Return predicted seconds ``[batch]``, in [0, limit], for logits ``[batch, outputs]``."""
        return self._decode(logits, duration).clamp(0, self.limit)

    @abstractmethod
    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        """Return seconds ``[batch]`` for logits ``[batch, outputs]``, not yet bounded."""


class _Standardised(BaseLoss):
    """Squared error of a standardised target: the logit counts standard deviations from the mean in training."""

    def __init__(self, target: np.ndarray, limit: float, facts: dict[str, Any]) -> None:
        mean, scale = float(target.mean()), float(target.std()) or 1.0
        super().__init__(np.zeros(1), limit, {**facts, "mean": mean, "scale": scale})
        self.mean, self.scale = mean, scale

    def loss(self, logits: Tensor, seconds: Tensor, duration: Tensor) -> Tensor:
        """Return the loss of each row, see :meth:`BaseLoss.loss`."""
        return (logits[:, 0] - (self._target(seconds, duration) - self.mean) / self.scale).square()

    def _value(self, logits: Tensor) -> Tensor:
        """Return the target that the logits predict, ``[batch]``."""
        return self.mean + self.scale * logits[:, 0]

    @abstractmethod
    def _target(self, seconds: Tensor, duration: Tensor) -> Tensor:
        """Return the target of the regression, ``[batch]``."""


class ValueRegression(_Standardised):
    """Value regression (VR): squared error of the seconds."""

    def __init__(self, seconds: np.ndarray) -> None:
        super().__init__(seconds, float(seconds.max()), {})

    def _target(self, seconds: Tensor, duration: Tensor) -> Tensor:
        return seconds

    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        return self._value(logits)


class PlayCompletion(_Standardised):
    """Play completion rate (PCR): seconds of stay divided by the video's duration, or by the median if unknown."""

    def __init__(self, seconds: np.ndarray, duration: np.ndarray) -> None:
        known = duration[duration > 0]
        self.median = float(np.median(known)) if len(known) else 1.0
        ratio = seconds / np.where(duration > 0, duration, self.median)
        super().__init__(ratio, float(seconds.max()), {"median_duration": self.median})

    def _target(self, seconds: Tensor, duration: Tensor) -> Tensor:
        return seconds / self._known(duration)

    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        return self._value(logits) * self._known(duration)

    def _known(self, duration: Tensor) -> Tensor:
        """Return the durations, with the median for unknown ones."""
        return duration.where(duration > 0, self.median)


class NormalisedDwellTime(_Standardised):
    """Normalised dwell time (NDT): a sigmoid of the seconds around a short stay.

    The short stay is ``exp(mean - std)`` of the logarithms of the stays above zero.
    """

    def __init__(self, seconds: np.ndarray) -> None:
        logs = np.log(seconds[seconds > 0])
        self.offset = float(np.exp(logs.mean() - logs.std())) if len(logs) else 0.0
        limit = float(seconds.max())
        self.range = tuple(self._transform(torch.tensor([0.0, limit], dtype=torch.float64)).tolist())
        target = self._transform(torch.from_numpy(seconds.astype(np.float64))).numpy()
        super().__init__(target, limit, {"offset": self.offset})

    def _transform(self, seconds: Tensor) -> Tensor:
        """Return the normalised dwell time of seconds."""
        return NDT_CEILING * torch.sigmoid((seconds - self.offset) / NDT_SCALE_S) - NDT_SHIFT

    def _target(self, seconds: Tensor, duration: Tensor) -> Tensor:
        return self._transform(seconds)

    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        share = (self._value(logits).clamp(*self.range) + NDT_SHIFT) / NDT_CEILING
        # The ceiling would be infinitely many seconds, and float32 can round to it.
        return self.offset + NDT_SCALE_S * torch.logit(share, 1e-6)


class WeightedLogistic(BaseLoss):
    """Weighted logistic regression (WLR): an opening has the weight of its seconds, another row has weight one.

    The odds are then ``E[seconds] / P(not open)``, and a second logit learns ``P(open)``. For watch time, which is
    rarely zero, the second factor is taken as 1; but comment areas are opened in a few per cent of rows at most.
    """

    def __init__(self, seconds: np.ndarray) -> None:
        opened = seconds > 0
        share = np.clip(opened.mean(), 1e-6, 1 - 1e-6)
        start = [math.log(max(seconds.mean(), 1e-6) / (1 - share)), math.log(share / (1 - share))]
        super().__init__(np.array(start), float(seconds.max()), {"opened": float(opened.mean())})

    def loss(self, logits: Tensor, seconds: Tensor, duration: Tensor) -> Tensor:
        """Return the loss of each row, see :meth:`BaseLoss.loss`."""
        opened = (seconds > 0).to(logits.dtype)
        weight = seconds.where(seconds > 0, torch.ones_like(seconds))
        weighted, plain = functional.binary_cross_entropy_with_logits(
            logits, opened[:, None].expand_as(logits), reduction="none"
        ).unbind(1)
        return weight * weighted + plain

    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        return logits[:, 0].clamp(max=_MOST_LOGIT).exp() * torch.sigmoid(-logits[:, 1])


class DurationQuantiles(BaseLoss):
    """Duration-grouped quantiles (D2Q): share of stays not longer than this one, among videos of similar duration.

    The distribution of a duration group is stored as points with linear interpolation between them. The first point is
    the share of rows that were not opened; a smaller share means 0 seconds.
    """

    edges: Tensor
    points: Tensor
    shares: Tensor

    def __init__(self, seconds: np.ndarray, duration: np.ndarray, groups: int) -> None:
        # Edges are durations of training rows, each the last one of its group, so that no group is empty.
        edges = np.unique(np.quantile(duration, np.linspace(0, 1, groups + 1)[1:-1], method="inverted_cdf"))
        edges = edges[edges < duration.max()]
        group = np.searchsorted(edges, duration)
        found = [_distribution(seconds[group == number]) for number in range(len(edges) + 1)]
        # Padding repeats the last point: these segments have no length, so no value falls into them.
        longest = max(len(points) for points, _ in found)
        points, shares = (
            np.stack([np.pad(part, (0, longest - len(part)), mode="edge") for part in parts])
            for parts in zip(*found, strict=True)
        )
        target = np.concatenate([np.interp(seconds[group == g], *found[g]) for g in range(len(found))])
        mean = float(np.clip(target.mean(), 1e-4, 1 - 1e-4))
        facts = {"duration_edges": edges.tolist(), "not_opened": shares[:, 0].tolist()}
        super().__init__(np.array([math.log(mean / (1 - mean))]), float(seconds.max()), facts)
        self.variance = float(target.var()) or 1.0
        for name, values in (("edges", edges), ("points", points), ("shares", shares)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def loss(self, logits: Tensor, seconds: Tensor, duration: Tensor) -> Tensor:
        """Return the loss of each row, see :meth:`BaseLoss.loss`."""
        group = self._group(duration)
        target = _interpolate(seconds, self.points[group], self.shares[group])
        return (torch.sigmoid(logits[:, 0]) - target).square() / self.variance

    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        group = self._group(duration)
        return _interpolate(torch.sigmoid(logits[:, 0]), self.shares[group], self.points[group])

    def _group(self, duration: Tensor) -> Tensor:
        """Return the duration group of each row."""
        return torch.bucketize(duration, self.edges)


class TreeProgression(BaseLoss):
    """Tree-based progressive regression (TPM): a balanced binary tree over ranges of seconds.

    Each inner node predicts if the stay is in its right half. The first leaf is a stay of zero; the others are quantile
    ranges of the stays of training. The prediction is the mean of the leaves' means, weighted with the probability of
    their paths.
    """

    bounds: Tensor
    means: Tensor
    right: Tensor
    left: Tensor

    def __init__(self, seconds: np.ndarray, leaves: int) -> None:
        opened = seconds[seconds > 0]
        inner = np.quantile(opened, np.linspace(0, 1, leaves)[1:-1]) if len(opened) else np.zeros(0)
        # Half-open ranges (bound, next bound]: the first bound keeps zero by itself.
        bounds = np.unique(np.append(0.0, inner[inner < seconds.max()])).astype(np.float32)
        leaf = np.searchsorted(bounds, seconds.astype(np.float32), side="left")
        count = np.bincount(leaf, minlength=len(bounds) + 1)
        means = np.bincount(leaf, seconds, len(bounds) + 1) / np.maximum(count, 1)
        right, left = _balanced_tree(len(count))
        ways = np.maximum(right @ count, 0.5) / np.maximum(left @ count, 0.5)
        facts = {"bounds": bounds.tolist(), "means": means.tolist()}
        super().__init__(np.log(ways), float(seconds.max()), facts)
        for name, values in (("bounds", bounds), ("means", means), ("right", right), ("left", left)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def loss(self, logits: Tensor, seconds: Tensor, duration: Tensor) -> Tensor:
        """Return the loss of each row, see :meth:`BaseLoss.loss`."""
        leaf = torch.bucketize(seconds, self.bounds)
        return -self._log_probability(logits).gather(1, leaf[:, None])[:, 0]

    def _decode(self, logits: Tensor, duration: Tensor) -> Tensor:
        return self._log_probability(logits).exp() @ self.means

    def _log_probability(self, logits: Tensor) -> Tensor:
        """Return the log-probability of each leaf, ``[batch, leaves]``."""
        return functional.logsigmoid(logits) @ self.right + functional.logsigmoid(-logits) @ self.left


def fit_base(
    kind: BaseKind, seconds: np.ndarray, duration: np.ndarray, *, duration_groups: int = 10, leaves: int = 16
) -> BaseLoss:
    """Fit a base loss on training rows.

    Args:
        kind: name of the base loss.
        seconds: ``[n]`` float, stays of the training rows; 0 if the comments were not opened.
        duration: ``[n]`` float, seconds of the videos; 0 if unknown.
        duration_groups: number of D2Q's quantile groups of the duration.
        leaves: number of TPM's leaves, including the one for zero; there are fewer if quantiles coincide.

    Raises:
        ValueError: the kind is unknown, or there is no row with a stay above zero.
    """
    if not (seconds > 0).any():
        raise ValueError("no row has a stay above zero: there is nothing to learn")
    # The losses get float32, so the fit uses the same rounded values.
    seconds, duration = seconds.astype(np.float32), duration.astype(np.float32)
    match kind:
        case "vr":
            return ValueRegression(seconds)
        case "wlr":
            return WeightedLogistic(seconds)
        case "d2q":
            return DurationQuantiles(seconds, duration, duration_groups)
        case "ndt":
            return NormalisedDwellTime(seconds)
        case "pcr":
            return PlayCompletion(seconds, duration)
        case "tpm":
            return TreeProgression(seconds, leaves)
    raise ValueError(f"no base loss is called {kind!r}")


def _distribution(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return zero and the quantiles of the stays above zero, ascending, and the share of stays up to each of them."""
    opened = seconds[seconds > 0]
    points = np.zeros(1)
    if len(opened):
        points = np.unique(np.append(0.0, np.quantile(opened, np.linspace(0, 1, QUANTILES), method="inverted_cdf")))
    shares = np.searchsorted(np.sort(seconds), points, side="right") / len(seconds)
    return points, shares


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Interpolate ``x [batch]`` linearly between each row's points ``known`` and ``values``, both ``[batch, k]``.

    Outside of the points the result is the first or the last value.
    """
    if known.shape[1] == 1:
        return values[:, 0]
    upper = torch.searchsorted(known, x[:, None], right=True).clamp(1, known.shape[1] - 1)
    (low, high), (first, last) = (
        (part.gather(1, upper - 1)[:, 0], part.gather(1, upper)[:, 0]) for part in (known, values)
    )
    share = ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return first + share * (last - first)


def _balanced_tree(leaves: int) -> tuple[np.ndarray, np.ndarray]:
    """Return matrices ``[leaves - 1, leaves]`` of 0 and 1 with the leaves right and left of each inner node."""
    right, left = np.zeros((2, max(leaves - 1, 0), leaves))
    ranges, node = [(0, leaves)], 0
    while ranges:
        start, stop = ranges.pop()
        if stop - start < 2:
            continue
        middle = (start + stop) // 2
        left[node, start:middle] = right[node, middle:stop] = 1
        node += 1
        ranges += [(start, middle), (middle, stop)]
    return right, left
