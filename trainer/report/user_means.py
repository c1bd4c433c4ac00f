"""Means of values over rows, with intervals over users, for all rows and for groups of them."""

from __future__ import annotations

import numpy as np

from trainer.metrics.user_bootstrap import draw_users, interval
from trainer.report.charts import Point

DRAWS = 200


class UserMeans:
    """Draws of the users of some rows.

    Args:
        user_id: ``[n]`` int64, user of each row.
    """

    def __init__(self, user_id: np.ndarray) -> None:
        self._index, counts = draw_users(user_id, DRAWS, seed=1)
        self._counts = counts.astype(np.float64)

    def of(self, values: np.ndarray, rows: np.ndarray | None = None) -> Point | None:
        """Return the mean of ``values [n]``, of all rows or of those of a mask; None without rows."""
        kept = np.ones(len(values), bool) if rows is None else rows
        if not kept.any():
            return None
        users = self._counts.shape[1]
        sums = np.bincount(self._index[kept], values[kept].astype(np.float64), users)
        sizes = np.bincount(self._index[kept], minlength=users)
        weight = self._counts @ sizes
        # A draw may have no user of the group.
        means = np.divide(self._counts @ sums, weight, out=np.full(len(weight), np.nan), where=weight > 0)
        return Point(float(means[0]), *interval(means[1:]))
