"""What users did before a time."""

from __future__ import annotations

import numpy as np


class Past:
    """Values of users, each known from a time on.

    Args:
        user_id: ``[n] int64``.
        known_ms: ``[n] int64``.
        value: ``[n]``.
    """

    def __init__(self, user_id: np.ndarray, known_ms: np.ndarray, value: np.ndarray) -> None:
        order = np.lexsort((known_ms, user_id))
        self._known_ms, self._value = known_ms[order], value[order]
        self._users, self._first = np.unique(user_id[order], return_index=True)
        self._first = np.append(self._first, len(order))

    @property
    def users(self) -> np.ndarray:
        """``[users] int64``, increasing: who has any."""
        return self._users

    def latest(self, user_id: int, before_ms: int, most: int) -> np.ndarray:
        """The last ``most`` values of a user that were known before a time, oldest first."""
        place = int(np.searchsorted(self._users, user_id))
        if place == len(self._users) or self._users[place] != user_id:
            return self._value[:0]
        first, last = self._first[place], self._first[place + 1]
        stop = first + int(np.searchsorted(self._known_ms[first:last], before_ms))
        return self._value[max(first, stop - most) : stop]
