"""Places of history entries on the device of a rank that searches there: only those of the rank's users are kept.

A rank reads the rows of its own partitions only, so its device keeps the entries of these users, partition after
partition. The places of a run on the device differ from those in the dataset by a number for each partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.features.device_listings import Listing, ListingKey, OwnEntries, listing_of, make_listing
from trainer.data.features.history_reads import HistoryRead
from trainer.data.format.history import Histories, HistorySlice
from trainer.data.format.schema import DOMAINS, Rows, partition_of

CHUNK_ENTRIES = 1 << 20
"""Number of entries that are read at a time."""


class DeviceRun(NamedTuple):
    """Runs of one history of n rows that are left to the device.

    Attributes:
        first: ``[n]`` int64, first place of each run: on the device for a search with scores, which looks for the best
            entries of the run; else in the listing of the history, and the run is what the search finds.
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
        # Users of partition p lie between lines p and p + 1 of the runs, their entries between edges p and p + 1.
        self._lines = np.cumsum([0, *users])
        stored = np.append(self._runs[:, 0], self._runs[-1:, -1])
        self._edges = np.append(stored, 0)[self._lines] if len(user_id) else np.zeros(partitions + 1, np.int64)
        self._own = sorted(own)
        self._shift = np.zeros(partitions, np.int64)
        self.entries = 0
        for p in self._own:
            self._shift[p] = self.entries - self._edges[p]
            self.entries += int(self._edges[p + 1] - self._edges[p])
        self._listings: dict[ListingKey, Listing] = {}

    def left(self, rows: Rows, first: np.ndarray, stop: np.ndarray, read: HistoryRead) -> DeviceRun:
        """Return runs of the dataset as runs of the device.

        Args:
            rows: ``user_id``, ``[n]`` int64, users of the rank's partitions, or unknown ones, whose runs are empty; and
                ``author_id`` of the candidates.
            first: place in the dataset of the first entry of each run, ``[n]`` int64; ``[n, domains]`` of a history of
                both domains.
            stop: place after the last one.
            read: the history.
        """
        shift = self._shift[partition_of(rows["user_id"], len(self._shift))]
        shift = shift if first.ndim == 1 else shift[:, None]
        lengths = stop - first
        begin = np.where(lengths > 0, first + shift, 0)
        if read.search == "top":
            return DeviceRun(begin, begin + lengths, np.minimum(lengths, read.length))
        key = listing_of(read)
        if key is None:
            end = begin + lengths
        else:
            begin, end = self.listing(key).run(first + shift, stop + shift, rows["author_id"])
        lengths = np.minimum(end - begin, read.length)
        return DeviceRun(end - lengths, end, lengths)

    def listing(self, key: ListingKey) -> Listing:
        """Return a listing of the entries; it is made at the first call, and loaders' processes share it after that."""
        if key not in self._listings:
            self._listings[key] = make_listing(key, self._parts())
        return self._listings[key]

    def read(self) -> Iterator[HistorySlice]:
        """Yield the entries in the order of their places on the device, some at a time, each as a user of its own."""
        starts = self._runs[:, :-1].reshape(-1)
        for stored in self._stored():
            at = np.arange(stored.start, stored.stop)
            # Of runs that begin at one place only the last one can have entries.
            run = np.searchsorted(starts, at, side="right") - 1
            yield self._histories.take(at, np.ones(len(at), np.int64), (run % len(DOMAINS)).astype(np.uint8))

    def column(self, name: str) -> Iterator[np.ndarray]:
        """Yield a column of the entries, see ``Histories.column``, as many at a time as :meth:`read`."""
        for stored in self._stored():
            yield self._histories.column(name)[stored]

    def _stored(self) -> Iterator[slice]:
        """Yield the places of the entries in the dataset, some at a time."""
        for p in self._own:
            for first in range(self._edges[p], self._edges[p + 1], CHUNK_ENTRIES):
                yield slice(first, min(first + CHUNK_ENTRIES, self._edges[p + 1]))

    def _parts(self) -> Iterator[OwnEntries]:
        """Yield what listings are made of, partition after partition."""
        for p in self._own:
            stored = slice(self._edges[p], self._edges[p + 1])
            runs = self._runs[self._lines[p] : self._lines[p + 1]] + self._shift[p]
            columns = (self._histories.column(name)[stored] for name in ("author_id", "ordinal", "bits"))
            yield OwnEntries(int(stored.start + self._shift[p]), runs, *columns)
