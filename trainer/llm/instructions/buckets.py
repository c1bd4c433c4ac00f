"""Ranges of staytimes, by their quantiles in the training days."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from trainer.console.errors import UserError


def fit_edges(staytime_ms: np.ndarray, buckets: int) -> tuple[float, ...]:
    """Edges in seconds between ``buckets`` ranges that are about equally frequent.

    Args:
        staytime_ms: ``[n] int64`` of visits of the training days, above 0.
        buckets: number of ranges, 2 or more.

    Returns:
        ``buckets - 1`` increasing edges, rounded to 0.1 s.

    Raises:
        UserError: there are no staytimes, or too many are alike for so many ranges.
    """
    if not len(staytime_ms):
        raise UserError("no comment area was opened before --evaluate-from; staytime ranges need some that were")
    edges = np.round(np.quantile(staytime_ms / 1000, np.arange(1, buckets) / buckets), 1)
    if (np.diff(edges, prepend=0) <= 0).any():
        raise UserError(f"staytimes are too much alike for {buckets} ranges (edges {edges.tolist()} s); take fewer")
    return tuple(edges.tolist())


def bucket_of(staytime_ms: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Range of each staytime, ``[n] int64`` from 0; an edge belongs to the range above it."""
    return np.searchsorted(np.array(edges), staytime_ms / 1000, side="right")


def ranges(edges: tuple[float, ...]) -> list[str]:
    """The ranges in words."""
    between = [f"{low:g} to {high:g} s" for low, high in pairwise(edges)]
    return [f"less than {edges[0]:g} s", *between, f"{edges[-1]:g} s or more"]
