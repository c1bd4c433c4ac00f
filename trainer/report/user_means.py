"""Means of values over rows, with intervals over users, for all rows and for groups of them."""

from __future__ import annotations

import numpy as np

from trainer.metrics.user_bootstrap import draw_users, resample_mean
from trainer.report.charts import Point
from trainer.report.held_out import point_of

DRAWS = 200


class UserMeans:
    """Draws of the users of some rows.

    Args:
        user_id: ``[n]`` int64, user of each row.
    """

    def __init__(self, user_id: np.ndarray) -> None:
        self._index, self._counts = draw_users(user_id, DRAWS, seed=1)

    def of(self, values: np.ndarray, rows: np.ndarray | None = None) -> Point | None:
        """Return the mean of ``values [n]``, of all rows or of those of a mask; None without rows."""
        kept = np.ones(len(values), bool) if rows is None else rows
        # A draw may have no user of the group, and then has no mean.
        return point_of(resample_mean(self._index[kept], self._counts, values[kept]))
