"""The comments at the top of a video, where a log tells of interactions with comments but not which were shown.

The comments of a video with most interactions before the day of the request count as shown, at most ``SHOWN``; of
equals, and of those without any, the ones with the lowest ids. What a list says was known when its day began.
"""

from __future__ import annotations

import numpy as np

SHOWN = 10


class DailyLists:
    """Lists of comments by video and day.

    Args:
        comment_id: ``[n] int64``, every comment, each once.
        item_id: ``[n] int64``, its video.
        touched: ``[m] int64``, comments of ``comment_id`` that somebody liked or answered.
        day: ``[m] int64``, of each of those.
        first_day: of the log.
        last_day: of the log.
    """

    def __init__(
        self,
        comment_id: np.ndarray,
        item_id: np.ndarray,
        touched: np.ndarray,
        day: np.ndarray,
        first_day: int,
        last_day: int,
    ) -> None:
        order = np.lexsort((comment_id, item_id))
        comment_id, item_id = comment_id[order], item_id[order]
        # most comments are never touched: only the first ones of a video can stand in a list all the same
        kept = (rank_in_runs(item_id) < SHOWN) | np.isin(comment_id, touched)
        comment_id, item_id = comment_id[kept], item_id[kept]
        by_id = np.argsort(comment_id)
        place = by_id[np.searchsorted(comment_id, touched, sorter=by_id)]
        self._items, row = np.unique(item_id, return_inverse=True)
        self._first_day = first_day
        shape = (last_day - first_day + 1, len(self._items), SHOWN)
        self._comments, self._counts = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        count = np.zeros(len(comment_id), np.int64)
        np.add.at(count, place[day < first_day], 1)
        for number in range(shape[0]):
            best = np.lexsort((comment_id, -count, row))
            rank = rank_in_runs(row[best])
            top = rank < SHOWN
            best, rank = best[top], rank[top]
            self._comments[number, row[best], rank] = comment_id[best]
            self._counts[number, row[best], rank] = count[best]
            np.add.at(count, place[day == first_day + number], 1)

    def of(self, item_id: np.ndarray, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Comments of videos on days, ``[n, SHOWN] int64``, -1 where there are fewer; and their interactions before."""
        if not len(self._items):
            return np.full((len(item_id), SHOWN), -1), np.zeros((len(item_id), SHOWN), np.int64)
        row = np.minimum(np.searchsorted(self._items, item_id), len(self._items) - 1)
        known = (self._items[row] == item_id)[:, None]
        number = day - self._first_day
        return np.where(known, self._comments[number, row], -1), np.where(known, self._counts[number, row], 0)


def rank_in_runs(key: np.ndarray) -> np.ndarray:
    """Place of each value in its run of equal values, ``[n] int64`` from 0; equal values lie side by side."""
    first = np.flatnonzero(np.diff(key, prepend=np.nan))
    return np.arange(len(key)) - np.repeat(first, np.diff(np.append(first, len(key))))
