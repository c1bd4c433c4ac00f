"""Freshness: the distribution of delays from the arrival of an event to the training step that learns from it."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from trainer.runtime.distributed import World
from trainer.stream.live.visit_features import NEVER

_PER_OCTAVE = 16
"""Bins per factor of two: quantiles are exact to 4.4 %."""

_FIRST_MS = 1.0
_BINS = 32 * _PER_OCTAVE

QUANTILES = (0.5, 0.9, 0.99)


class Freshness:
    """Histogram of delays with bins that grow by 4.4 % each, from a millisecond to 49 days."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)

    def add(self, arrived_ms: np.ndarray, counts: np.ndarray, now_ms: int) -> None:
        """Count the delays of behaviours that were just trained on.

        Args:
            arrived_ms: arrival times by the clock, any shape, int64; ``NEVER`` where unknown.
            counts: mask of the same shape, True for the delays to count.
            now_ms: the current time by the clock.
        """
        delays = np.maximum(now_ms - arrived_ms[counts & (arrived_ms != NEVER)], _FIRST_MS)
        # Logarithmic bins give the same relative error for delays of milliseconds and of days.
        bins = np.minimum(np.log2(delays / _FIRST_MS) * _PER_OCTAVE, _BINS - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=_BINS)

    def summary(self, world: World) -> dict[str, float] | None:
        """Return quantiles in seconds over all ranks (``p50``, ...) and ``count``; None without delays. Collective."""
        counts = torch.from_numpy(self._counts.copy())
        dist.all_reduce(counts, group=world.control)
        total = int(counts.sum())
        if not total:
            return None
        below = np.cumsum(counts.numpy())
        places = [int(np.searchsorted(below, quantile * total)) for quantile in QUANTILES]
        # A delay is reported as the middle of its bin on the logarithmic scale.
        seconds = [_FIRST_MS / 1000 * 2 ** ((place + 0.5) / _PER_OCTAVE) for place in places]
        return {
            "count": total,
            **{f"p{round(100 * quantile)}": value for quantile, value in zip(QUANTILES, seconds, strict=True)},
        }
