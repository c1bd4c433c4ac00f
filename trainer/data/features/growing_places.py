"""Places of growing history entries on the device of a rank: those that they have on the host.

The device keeps a copy of columns that change: runs get entries, move when they are full, lose their oldest entries,
and move together when gaps are removed. Only entries that are new travel to the device; those that it has move there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.data.features.device_places import DeviceRun
from trainer.data.format.growing_history import GrowingHistories, ranges
from trainer.data.format.schema import DOMAINS


class PlaceChanges(NamedTuple):
    """Changes that bring the columns of a device up to date.

    Attributes:
        size: number of places that entries have, or may get without a move.
        afresh: True if the columns are to be replaced by new ones, with the entries of ``moves`` only.
        moves: ``[3, runs]`` int64: first place of the entries of a run, the place to move it to, and their number. They
            move to places without entries.
        added: ``[n]`` int64, places of the entries that are not on the device.
        domain: ``[n]`` uint8, codes of their domains.
    """

    size: int
    afresh: bool
    moves: np.ndarray
    added: np.ndarray
    domain: np.ndarray


class GrowingPlaces:
    """Places of entries on the device of a rank: those on the host, as of the last :meth:`changes`.

    Args:
        histories: histories of the rank's users.
    """

    def __init__(self, histories: GrowingHistories) -> None:
        self._histories = histories
        self._begin = self._end = self._dropped = np.zeros(0, np.int64)

    def changes(self) -> PlaceChanges:
        """Return the changes since the last call; at first all entries are added. The device must make them."""
        found = self._histories.changes()
        run = found.run
        if len(run) and (more := int(run.max()) + 1 - len(self._begin)) > 0:
            # The size doubles, so that users who arrive one by one do not each cost a copy.
            more += len(self._begin)
            self._begin, self._end, self._dropped = (
                np.concatenate([column, np.zeros(more, np.int64)]) for column in (self._begin, self._end, self._dropped)
            )
        lost = found.dropped - self._dropped[run]
        source, length = self._begin[run] + lost, found.end - found.begin
        kept = np.where(found.reordered, 0, np.maximum(self._end[run] - source, 0))
        moved = (kept > 0) & (found.compacted | (source != found.begin))
        moves = np.stack([source[moved], found.begin[moved], kept[moved]])
        added = ranges(found.begin + kept, length - kept)
        domain = np.repeat((run % len(DOMAINS)).astype(np.uint8), length - kept)
        self._begin[run], self._end[run], self._dropped[run] = found.begin, found.end, found.dropped
        return PlaceChanges(found.size, found.compacted, moves, added, domain)

    def left(self, first: np.ndarray, stop: np.ndarray, length: int) -> DeviceRun:
        """Return runs of the histories as runs of the device.

        Args:
            first: ``[n]`` int64, place of the first entry of each run.
            stop: ``[n]`` int64, place after the last one.
            length: largest number of entries that the search finds for a row.
        """
        lengths = stop - first
        at = np.where(lengths > 0, first, 0)
        return DeviceRun(at, at + lengths, np.minimum(lengths, length))
