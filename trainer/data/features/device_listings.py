"""Orders of history entries in which one run has all that a search without scores may find.

Such a search takes the latest entries of the candidate's author, of both domains, or with a required behaviour. In a
fitting order these are the last ones of a run, whose bounds are found by binary search. So the number of entries that a
search finds is known without reading the history, and the device only copies what is there.

Places are those of a rank's entries on its device: users one after the other, the domains of a user one after the
other, and the entries of a domain in order of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from trainer.data.features.history_reads import HistoryRead
from trainer.data.format.history import bisect_runs
from trainer.data.format.sorting import stable_order

CHUNK_ENTRIES = 1 << 20
"""Number of entries that are handled at a time."""


class OwnEntries(NamedTuple):
    """Entries of some users, as they are stored.

    Attributes:
        first: place on the device of the first entry.
        runs: ``[users, domains + 1]`` int64, places on the device: the entries of a user's domain k lie between the
            numbers k and k + 1 of its line.
        author_id: ``[entries]`` int64.
        ordinal: ``[entries]`` int32, order in time of a user's entries over all domains.
        bits: ``[entries]`` int32, behaviours of each visit.
    """

    first: int
    runs: np.ndarray
    author_id: np.ndarray
    ordinal: np.ndarray
    bits: np.ndarray


class Listing(Protocol):
    """Entries in an order of their own."""

    def __len__(self) -> int:
        """Return the number of entries that are listed."""

    def places(self) -> Iterator[np.ndarray]:
        """Yield the place of each listed entry, int64, in order, some at a time."""

    def run(self, first: np.ndarray, stop: np.ndarray, author_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers in the listing of what a search of n rows may find, ``[first, stop)``, each ``[n]`` int64.

        Args:
            first: place of the first entry of each run, ``[n]`` or ``[n, domains]`` int64.
            stop: place after the last one.
            author_id: ``[n]`` int64, authors of the candidates.
        """


class AuthorListing:
    """Entries of each user and domain by author, and those of an author in order of time.

    Args:
        parts: all entries of the rank, in order of their places.
    """

    def __init__(self, parts: Iterable[OwnEntries]) -> None:
        starts, authors, within = [], [], []
        for part in parts:
            lengths = np.diff(part.runs, axis=1).reshape(-1)
            run = np.repeat(np.arange(len(lengths)), lengths)
            by_author = stable_order(part.author_id)
            order = by_author[stable_order(run[by_author])]
            starts.append(part.runs[:, :-1].reshape(-1))
            authors.append(part.author_id[order])
            within.append((order + part.first - starts[-1][run]).astype(np.int32))
        self._starts = np.concatenate([np.empty(0, np.int64), *starts])
        self._authors = np.concatenate([np.empty(0, np.int64), *authors])
        # A run has less than 2^31 entries.
        self._within = np.concatenate([np.empty(0, np.int32), *within])
        self._edges = np.append(self._starts, len(self._authors))

    def __len__(self) -> int:
        return len(self._authors)

    def places(self) -> Iterator[np.ndarray]:
        """Yield the places of the entries; see :class:`Listing`."""
        for begin in range(0, len(self), CHUNK_ENTRIES):
            here = np.arange(begin, min(begin + CHUNK_ENTRIES, len(self)))
            yield self._starts[self._run_of(here)] + self._within[here]

    def run(self, first: np.ndarray, stop: np.ndarray, author_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of the candidates' authors; see :class:`Listing`."""
        some = stop > first
        run = np.where(some, self._run_of(first), 0)
        # The entries of a run are the same in both orders.
        begin, end = (np.where(some, edges[run] if len(edges) else 0, 0) for edges in (self._starts, self._edges[1:]))
        low = bisect_runs(self._authors, begin, end, author_id)
        high = bisect_runs(self._authors, low, end, author_id, after=True)
        low = bisect_runs(self._within, low, high, first - begin)
        return low, bisect_runs(self._within, low, high, stop - begin)

    def _run_of(self, places: np.ndarray) -> np.ndarray:
        """Return the run of each place: of runs that begin at one place only the last one can have entries."""
        return np.searchsorted(self._starts, places, side="right") - 1


class RequiredListing:
    """Entries with a required behaviour, in order of their places.

    Args:
        parts: all entries of the rank, in order of their places.
        require: bits of the behaviours of which an entry must have one.
    """

    def __init__(self, parts: Iterable[OwnEntries], require: int) -> None:
        found = [np.flatnonzero(part.bits & require) + part.first for part in parts]
        self._places = np.concatenate([np.empty(0, np.int64), *found])

    def __len__(self) -> int:
        return len(self._places)

    def places(self) -> Iterator[np.ndarray]:
        """Yield the places of the entries; see :class:`Listing`."""
        yield self._places

    def run(self, first: np.ndarray, stop: np.ndarray, author_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of each run; see :class:`Listing`."""
        return np.searchsorted(self._places, first), np.searchsorted(self._places, stop)


class TimeListing:
    """Entries of each user in order of time over all domains.

    What is known at a time, of the user's last visits, is a run of this order.

    Args:
        parts: all entries of the rank, in order of their places.
        require: bits of the behaviours of which an entry must have one; 0 lists all entries.
    """

    def __init__(self, parts: Iterable[OwnEntries], require: int) -> None:
        runs, numbers, places, size = [], [], [], 0
        for part in parts:
            lengths = part.runs[:, -1] - part.runs[:, 0]
            user = np.repeat(np.arange(len(lengths)), lengths)
            in_time = stable_order(part.ordinal)
            order = in_time[stable_order(user[in_time])]
            kept = np.flatnonzero(part.bits[order] & require) if require else np.arange(len(order))
            runs.append(part.runs)
            numbers.append(kept + part.first)
            places.append(order[kept] + part.first)
            size = part.first + len(order)
        self._runs = np.concatenate(runs) if runs else np.zeros((0, 1), np.int64)
        self._size = size
        # Without a requirement all numbers are there, and each is its own place.
        self._numbers = np.concatenate([np.empty(0, np.int64), *numbers]) if require else None
        self._places = np.concatenate([np.empty(0, np.int64), *places])

    def __len__(self) -> int:
        return len(self._places)

    def places(self) -> Iterator[np.ndarray]:
        """Yield the places of the entries; see :class:`Listing`."""
        yield self._places

    def run(self, first: np.ndarray, stop: np.ndarray, author_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of all domains; see :class:`Listing`."""
        some = np.any(stop > first, axis=1)
        if not some.any():
            return np.zeros(len(some), np.int64), np.zeros(len(some), np.int64)
        place = np.where(stop > first, first, -1).max(axis=1)
        # Of users that begin at one place only the last one can have entries.
        user = np.where(some, np.searchsorted(self._runs[:, 0], place, side="right") - 1, 0)
        runs = self._runs[user]
        # Known visits come first in a run of a domain, and in the order over all domains.
        high = runs[:, 0] + (stop - runs[:, :-1]).sum(axis=1)
        low = high - (stop - first).sum(axis=1)
        low, high = np.where(some, low, 0), np.where(some, high, 0)
        if self._numbers is None:
            return low, high
        return np.searchsorted(self._numbers, low), np.searchsorted(self._numbers, high)


class ListingKey(NamedTuple):
    """Name of a listing, which histories share: ``author``, ``time`` or ``required``, and the required bits."""

    order: str
    require: int = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of an entry in the memory of the host, at most."""
        return {"author": 12, "required": 8, "time": 16 if self.require else 8}[self.order]


def listing_of(read: HistoryRead) -> ListingKey | None:
    """Return the listing that serves a history; None if its search needs scores, or the stored order is the one."""
    if read.search == "author":
        return ListingKey("author")
    if read.search == "top":
        return None
    if read.domain is None:
        return ListingKey("time", read.require)
    return ListingKey("required", read.require) if read.require else None


def make_listing(key: ListingKey, parts: Iterable[OwnEntries]) -> Listing:
    """Return a listing of the entries of a rank."""
    if key.order == "author":
        return AuthorListing(parts)
    return TimeListing(parts, key.require) if key.order == "time" else RequiredListing(parts, key.require)
