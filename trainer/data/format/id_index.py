"""A growing map from int64 ids to the numbers 0, 1, 2, ..., with vectorised lookups."""

from __future__ import annotations

import numpy as np

_FIRST_SLOTS = 1024
# 2^64 / golden ratio: multiplication by it spreads neighbouring ids over the top bits (Fibonacci hashing).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class IdIndex:
    """Numbers ids in the order in which they are first added. It is exact: two ids never share a number.

    The index is an open-addressing hash table with linear probing. It is at most half full and takes 24 to 48 bytes per
    id. A lookup of n ids takes a few array operations, whatever the ids are.
    """

    def __init__(self) -> None:
        self._count = 0
        self._ids = np.empty(_FIRST_SLOTS // 2, np.int64)
        self._allocate(_FIRST_SLOTS)

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> np.ndarray:
        """Ids by number, ``[len(self)] int64``: ``ids[find(x)] == x``."""
        return self._ids[: self._count]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of each id, or -1 if it was never added. ``[n] int64 -> [n] int64``."""
        slot = self._slots_of(ids)
        number = self._number_in[slot]
        # All ids whose slot holds another id move on by one slot in each round, until they meet themselves or a gap.
        probing = np.flatnonzero((number >= 0) & (self._id_in[slot] != ids))
        while len(probing):
            slot[probing] = (slot[probing] + 1) & self._mask
            at = slot[probing]
            number[probing] = self._number_in[at]
            probing = probing[(number[probing] >= 0) & (self._id_in[at] != ids[probing])]
        return number

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of each id, and add ids that are new. ``[n] int64 -> [n] int64``.

        New ids get the next numbers, in increasing order of id.
        """
        number = self.find(ids)
        missing = np.flatnonzero(number < 0)
        if len(missing):
            new, which = np.unique(ids[missing], return_inverse=True)
            number[missing] = self._count + which
            self._append(new)
        return number

    def _append(self, new: np.ndarray) -> None:
        """Store distinct new ids, ``[n] int64``, under the next numbers."""
        first, self._count = self._count, self._count + len(new)
        if self._count > len(self._ids):
            grown = np.empty(max(self._count, 2 * len(self._ids)), np.int64)
            grown[:first] = self._ids[:first]
            self._ids = grown
        self._ids[first : self._count] = new
        # A table at most half full keeps probe sequences short.
        if 2 * self._count > self._mask + 1:
            self._allocate(1 << (4 * self._count - 1).bit_length())
            first = 0
        self._insert(np.arange(first, self._count))

    def _insert(self, number: np.ndarray) -> None:
        """Write the ids of some numbers into free slots of the hash table."""
        slot = self._slots_of(self._ids[number])
        while len(number):
            free = self._number_in[slot] < 0
            self._number_in[slot[free]] = number[free]
            # Several ids may have written to one free slot: the last one keeps it, the others move on.
            placed = self._number_in[slot] == number
            self._id_in[slot[placed]] = self._ids[number[placed]]
            number, slot = number[~placed], (slot[~placed] + 1) & self._mask

    def _allocate(self, slots: int) -> None:
        """Make an empty hash table; ``slots`` is a power of two."""
        self._mask = slots - 1
        self._shift = np.uint64(64 - self._mask.bit_length())
        self._id_in = np.zeros(slots, np.int64)
        self._number_in = np.full(slots, -1, np.int64)

    def _slots_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the slot where the search for each id begins."""
        bits = ids.astype(np.uint64)
        with np.errstate(over="ignore"):
            return (((bits ^ (bits >> np.uint64(32))) * _SPREAD) >> self._shift).astype(np.int64)
