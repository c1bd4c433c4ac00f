"""Features that were logged with a request: the model's input of a visit, as of the time of the request.

Statistics are over the rows of all users. If they were computed later, they would include the future, so they travel
with the event that opens the visit. Few events have features, so the features are kept in rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.format.schema import DatasetSpec, row_columns

FEATURES = ("side", "dense", "stat")
"""Columns of ``schema.row_columns`` that are logged."""


@dataclass(frozen=True)
class RequestFeatures:
    """Logged features of some events of a batch.

    Only the event that opens a visit in a candidate domain has features: its exposure, or its enter if the producer
    has no exposures.

    Attributes:
        at: ``[m]`` int64, positions of these events in the batch, ascending.
        side: ``[m, len(spec.side)]`` int32.
        dense: ``[m, len(spec.dense)]`` float32.
        stat: ``[m, keys * (1 + behaviours)]`` float32, as ``schema.row_columns`` has it.
    """

    at: np.ndarray
    side: np.ndarray
    dense: np.ndarray
    stat: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def rows(self, which: np.ndarray | slice, at: np.ndarray) -> RequestFeatures:
        """Return the rows ``which``, for events at the new positions ``at``."""
        return RequestFeatures(at, self.side[which], self.dense[which], self.stat[which])

    def part(self, first: int, stop: int) -> RequestFeatures:
        """Return the features of the events ``[first, stop)`` of the batch."""
        # Positions ascend, so a range of events is a range of rows.
        inside = slice(*np.searchsorted(self.at, [first, stop]).tolist())
        return self.rows(inside, self.at[inside] - first)

    def take(self, events: np.ndarray) -> RequestFeatures:
        """Return the features of a batch of chosen events, ``[n]`` distinct positions in any order."""
        if not len(self):
            return self
        # One more entry, -1, stands for all events after the last one with features.
        row = np.full(int(self.at[-1]) + 2, -1, np.int64)
        row[self.at] = np.arange(len(self))
        which = row[np.minimum(events, len(row) - 1)]
        at = np.flatnonzero(which >= 0)
        return self.rows(which[at], at)

    @staticmethod
    def join(parts: Sequence[RequestFeatures], events: Sequence[int]) -> RequestFeatures:
        """Concatenate the features of one or more batches, which have ``events`` events each."""
        if len(parts) == 1:
            return parts[0]
        first = np.cumsum([0, *events[:-1]]).tolist()
        at = np.concatenate([part.at + start for part, start in zip(parts, first, strict=True)])
        return RequestFeatures(at, *(np.concatenate([getattr(part, name) for part in parts]) for name in FEATURES))


def empty_features(spec: DatasetSpec) -> RequestFeatures:
    """Return the features of events that have none: all arrays have 0 rows."""
    layout = row_columns(spec)
    return RequestFeatures(
        np.empty(0, np.int64), *(np.empty((0, *layout[name][1]), layout[name][0]) for name in FEATURES)
    )
