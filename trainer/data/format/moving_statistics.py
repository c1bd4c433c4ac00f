"""Statistics of requests that come in the order of time, each as of its own time, from the rows of a dataset.

One pass over a dataset for every few requests would take too long while live rooms are followed. Here the counts of
all rows before a window of time are kept, and the rows inside of the window. The window moves forward with the
requests, so each record of the dataset is read about once, and memory grows with the distinct keys and with the rows
of the window.
"""

from __future__ import annotations

import numpy as np

from trainer.data.format.dataset import Dataset, selected_rows, statistics_as_of
from trainer.data.format.schema import Rows
from trainer.data.format.statistics import FrozenStatistics, StatisticsAsOf
from trainer.data.format.time_selection import Selection

WINDOW_MS = 3_600_000
"""Time for which the window reaches beyond the latest request when it moves, and before the earliest one."""


class MovingStatistics:
    """Statistics as of times that mostly move forward.

    Args:
        data: dataset whose rows are counted.
    """

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._before = FrozenStatistics(data.spec)
        self._inside: list[Rows] = []
        # Rows emitted before ``from`` are in the counts, those before ``until`` in the window.
        self._from_ms = self._until_ms = np.iinfo(np.int64).min

    def as_of(self, requests: Rows) -> np.ndarray:
        """Return the statistics of requests, as :func:`trainer.data.format.dataset.statistics_as_of` does.

        Requests from before the window, later than others by more than an hour, take a pass over the dataset.

        Args:
            requests: n rows with the columns of the keys, ``user_id`` and ``request_ms``, in any order.

        Returns:
            ``[n, keys * (1 + behaviours)] float32``.
        """
        times = requests["request_ms"]
        if not len(times) or int(times.min()) < self._from_ms:
            return statistics_as_of(self._data, requests)
        if int(times.max()) > self._until_ms:
            self._move(int(times.min()) - WINDOW_MS, int(times.max()) + WINDOW_MS)
        recent = StatisticsAsOf(self._data.spec, requests)
        for rows in self._inside:
            recent.add(rows)
        # Whole numbers until the end, so that large counts are rounded once, as those of one pass are.
        counts = self._before.lookup(requests, np.int64) + recent.lookup(np.int64)
        return counts.astype(np.float32)

    def _move(self, from_ms: int, until_ms: int) -> None:
        """Move the window; its begin never moves back."""
        from_ms = max(from_ms, self._from_ms)
        read = selected_rows(self._data, Selection(emit_from=self._until_ms, emit_until=until_ms))
        kept = []
        for rows in (*self._inside, *read):
            old = rows["emit_ms"] < from_ms
            self._before.add({name: column[old] for name, column in rows.items()})
            if not old.all():
                kept.append({name: column[~old] for name, column in rows.items()})
        self._inside, self._from_ms, self._until_ms = kept, from_ms, until_ms
