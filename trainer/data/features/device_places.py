"""Places of history entries on the device of a rank that searches there: only those of the rank's users are kept.

A rank reads the rows of its own partitions only, so its device keeps the entries of these users, partition after
partition. The places of a run on the device differ from those in the dataset by a number for each partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.format.history import Histories, HistorySlice
from trainer.data.format.schema import DOMAINS, partition_of

CHUNK_ENTRIES = 1 << 20
"""Number of entries that are read at a time."""


class DeviceRun(NamedTuple):
    """Runs of one history of n rows that are left to the device to search.

    Attributes:
        first: ``[n]`` int64, place on the device of the first entry of each run.
        stop: ``[n]`` int64, place after the last one.
        lengths: ``[n]`` int64, number of entries that the search will find for each row.
    """

    first: np.ndarray
    stop: np.ndarray
    lengths: np.ndarray


class DevicePlaces:
    """Places of entries on the device of a rank.

    Args:
        histories: histories of the dataset, which do not change.
        partitions: number of partitions of the dataset.
        own: partitions of the rank.

    Attributes:
        entries: number of entries on the device.
    """

    def __init__(self, histories: Histories, partitions: int, own: Sequence[int]) -> None:
        self._histories = histories
        self._runs = histories.stored_runs(partitions)
        user_id, _ = histories.lengths()
        users = np.bincount(partition_of(user_id, partitions), minlength=partitions)
        # Entries of partition p lie between edges p and p + 1.
        stored = np.append(self._runs[:, 0], self._runs[-1:, -1])
        edges = np.append(stored, 0)[np.cumsum([0, *users])] if len(user_id) else np.zeros(partitions + 1, np.int64)
        self._parts = [(int(edges[p]), int(edges[p + 1])) for p in sorted(own)]
        self._shift = np.zeros(partitions, np.int64)
        self.entries = 0
        for p, (begin, end) in zip(sorted(own), self._parts, strict=True):
            self._shift[p] = self.entries - begin
            self.entries += end - begin

    def left(self, user_id: np.ndarray, first: np.ndarray, stop: np.ndarray, length: int) -> DeviceRun:
        """Return runs of the dataset as runs of the device.

        Args:
            user_id: ``[n]`` int64, users of the rank's partitions, or unknown ones, whose runs are empty.
            first: ``[n]`` int64, place in the dataset of the first entry of each run.
            stop: ``[n]`` int64, place after the last one.
            length: largest number of entries that the search finds for a row.
        """
        shift = self._shift[partition_of(user_id, len(self._shift))]
        lengths = stop - first
        at = np.where(lengths > 0, first + shift, 0)
        return DeviceRun(at, at + lengths, np.minimum(lengths, length))

    def read(self) -> Iterator[HistorySlice]:
        """Yield the entries in the order of their places on the device, some at a time, each as a user of its own."""
        starts = self._runs[:, :-1].reshape(-1)
        for begin, end in self._parts:
            for first in range(begin, end, CHUNK_ENTRIES):
                at = np.arange(first, min(first + CHUNK_ENTRIES, end))
                # Of runs that begin at one place only the last one can have entries.
                run = np.searchsorted(starts, at, side="right") - 1
                yield self._histories.take(at, np.ones(len(at), np.int64), (run % len(DOMAINS)).astype(np.uint8))
