"""Lookup of what users did before a time."""

from __future__ import annotations

import numpy as np


class UserTimeline:
    """Values of users in order of the time from which they are known.

    Args:
        user_id: ``[n] int64``.
        known_ms: ``[n] int64``, time from which each value is known.
        value: ``[n]``.
    """

    def __init__(self, user_id: np.ndarray, known_ms: np.ndarray, value: np.ndarray) -> None:
        order = np.lexsort((known_ms, user_id))
        self._known_ms, self._value = known_ms[order], value[order]
        self._users, self._first = np.unique(user_id[order], return_index=True)
        self._first = np.append(self._first, len(order))

    @property
    def users(self) -> np.ndarray:
        """Users with at least one value, ``[users] int64``, increasing."""
        return self._users

    def latest(self, user_id: int, before_ms: int, most: int) -> np.ndarray:
        """Return the last ``most`` values of a user that were known before a time, oldest first."""
        row = int(np.searchsorted(self._users, user_id))
        if row == len(self._users) or self._users[row] != user_id:
            return self._value[:0]
        first, last = self._first[row], self._first[row + 1]
        stop = first + int(np.searchsorted(self._known_ms[first:last], before_ms))
        return self._value[max(first, stop - most) : stop]
