"""Estimated comments at the top of a video, for a log that does not record which comments were shown.

The comments of a video with the most interactions before the day of the request are taken as shown, at most ``SHOWN``.
Among comments with equally many interactions, or none, those with the lowest ids come first. A list uses only
information from before its day.
"""

from __future__ import annotations

import numpy as np

SHOWN = 10


class DailyTopComments:
    """Top comments by video and day.

    Args:
        comment_id: ``[n] int64``, all comments, each once.
        item_id: ``[n] int64``, video of each comment.
        interacted: ``[m] int64``, comments of ``comment_id`` that a user liked or answered, one entry per interaction.
        day: ``[m] int64``, day of each interaction.
        first_day: first day of the log.
        last_day: last day of the log.
    """

    def __init__(
        self,
        comment_id: np.ndarray,
        item_id: np.ndarray,
        interacted: np.ndarray,
        day: np.ndarray,
        first_day: int,
        last_day: int,
    ) -> None:
        order = np.lexsort((comment_id, item_id))
        comment_id, item_id = comment_id[order], item_id[order]
        # Most comments have no interaction; of these only the first ones of a video can be in a list.
        kept = (rank_in_runs(item_id) < SHOWN) | np.isin(comment_id, interacted)
        comment_id, item_id = comment_id[kept], item_id[kept]
        by_id = np.argsort(comment_id)
        position = by_id[np.searchsorted(comment_id, interacted, sorter=by_id)]
        self._items, row = np.unique(item_id, return_inverse=True)
        self._first_day = first_day
        shape = (last_day - first_day + 1, len(self._items), SHOWN)
        self._comments, self._counts = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        # each list is made before the interactions of its own day are counted
        count = np.zeros(len(comment_id), np.int64)
        np.add.at(count, position[day < first_day], 1)
        for number in range(shape[0]):
            best = np.lexsort((comment_id, -count, row))
            rank = rank_in_runs(row[best])
            top = rank < SHOWN
            best, rank = best[top], rank[top]
            self._comments[number, row[best], rank] = comment_id[best]
            self._counts[number, row[best], rank] = count[best]
            np.add.at(count, position[day == first_day + number], 1)

    def lookup(self, item_id: np.ndarray, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the top comments of videos on given days, and their earlier interactions.

        Args:
            item_id: ``[n] int64``.
            day: ``[n] int64``, between ``first_day`` and ``last_day``.

        Returns:
            Comments and numbers of interactions before that day, ``[n, SHOWN] int64``; a comment is -1 where the video
            has fewer.
        """
        if not len(self._items):
            return np.full((len(item_id), SHOWN), -1), np.zeros((len(item_id), SHOWN), np.int64)
        row = np.minimum(np.searchsorted(self._items, item_id), len(self._items) - 1)
        known = (self._items[row] == item_id)[:, None]
        number = day - self._first_day
        return np.where(known, self._comments[number, row], -1), np.where(known, self._counts[number, row], 0)


def rank_in_runs(key: np.ndarray) -> np.ndarray:
    """Return the position of each value in its run of equal neighbours, ``[n] int64`` from 0."""
    first = np.flatnonzero(np.diff(key, prepend=np.nan))
    return np.arange(len(key)) - np.repeat(first, np.diff(np.append(first, len(key))))
