"""Features that were logged with a request: what the model may know of a visit, as of the moment it was asked for.

Statistics are over the rows of all users. Computed later they would hold what had not happened yet, so they travel with
the event that opens the visit. Few events carry them: they lie beside the columns of the events, in rows of their own.
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
    """Features of the events of a batch that carry them.

    These are events that open a visit in a candidate domain: its exposure, or where a producer has none its enter.

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
        """The rows ``which``, of events that are now at positions ``at``."""
        return RequestFeatures(at, self.side[which], self.dense[which], self.stat[which])

    def part(self, first: int, stop: int) -> RequestFeatures:
        """Of the events ``[first, stop)`` of the batch."""
        inside = slice(*np.searchsorted(self.at, [first, stop]).tolist())
        return self.rows(inside, self.at[inside] - first)

    def take(self, events: np.ndarray) -> RequestFeatures:
        """Of a batch that has these events of this one, ``[n]`` distinct positions in any order, in their order."""
        if not len(self):
            return self
        # Behind the last event that carries features none does.
        row = np.full(int(self.at[-1]) + 2, -1, np.int64)
        row[self.at] = np.arange(len(self))
        which = row[np.minimum(events, len(row) - 1)]
        at = np.flatnonzero(which >= 0)
        return self.rows(which[at], at)

    @staticmethod
    def join(parts: Sequence[RequestFeatures], events: Sequence[int]) -> RequestFeatures:
        """Of batches behind one another, at least one, of so many ``events`` each."""
        if len(parts) == 1:
            return parts[0]
        first = np.cumsum([0, *events[:-1]]).tolist()
        at = np.concatenate([part.at + start for part, start in zip(parts, first, strict=True)])
        return RequestFeatures(at, *(np.concatenate([getattr(part, name) for part in parts]) for name in FEATURES))


def empty_features(spec: DatasetSpec) -> RequestFeatures:
    """Of events that carry no features."""
    layout = row_columns(spec)
    return RequestFeatures(
        np.empty(0, np.int64), *(np.empty((0, *layout[name][1]), layout[name][0]) for name in FEATURES)
    )
