"""Ranges of staytimes, from the quantiles of the training days."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from trainer.console.errors import UserError


def fit_edges(staytime_ms: np.ndarray, buckets: int) -> tuple[float, ...]:
    """Return the edges in seconds between ``buckets`` ranges that are about equally frequent.

    Args:
        staytime_ms: ``[n] int64``, staytimes of visits of the training days, above 0.
        buckets: number of ranges, 2 or more.

    Returns:
        ``buckets - 1`` increasing edges, rounded to 0.1 s.

    Raises:
        UserError: there are no staytimes, or too many are equal for this number of ranges.
    """
    if not len(staytime_ms):
        raise UserError("no comment area was opened before --evaluate-from; choose a later time, the ranges need some")
    edges = np.round(np.quantile(staytime_ms / 1000, np.arange(1, buckets) / buckets), 1)
    if (np.diff(edges, prepend=0) <= 0).any():
        raise UserError(f"staytimes are too similar for {buckets} ranges (edges {edges.tolist()} s); use fewer ranges")
    return tuple(edges.tolist())


def bucket_of(staytime_ms: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Return the range of each staytime, ``[n] int64`` from 0; an edge belongs to the range above it."""
    return np.searchsorted(np.array(edges), staytime_ms / 1000, side="right")


def ranges(edges: tuple[float, ...]) -> list[str]:
    """Return the ranges in words."""
    between = [f"{low:g} to {high:g} s" for low, high in pairwise(edges)]
    return [f"less than {edges[0]:g} s", *between, f"{edges[-1]:g} s or more"]
