"""Unique ids of an array, found by hashing instead of sorting."""

from __future__ import annotations

import numpy as np

from modules.compiled import compiled

_GOLDEN = 0x9E3779B97F4A7C15
"""2 ** 64 divided by the golden ratio: it spreads the high bits of a product evenly (Knuth, volume 3, 6.4)."""


@compiled(nogil=True)
def find_unique(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the unique ids in order of first appearance, ``[unique]`` int64, and the place of each, ``[ids]`` int32.

    It uses a hash table with open addressing, at most half full, whose slots hold indices into the unique ids.

    Args:
        ids: ``[ids]`` int64, fewer than 2 ** 31.
    """
    bits = 4
    while (1 << bits) < 2 * len(ids):
        bits += 1
    slots, mask = np.full(1 << bits, -1, np.int32), (1 << bits) - 1
    unique, places, found = np.empty(len(ids), np.int64), np.empty(len(ids), np.int32), 0
    for i in range(len(ids)):
        slot = np.int64((np.uint64(ids[i]) * np.uint64(_GOLDEN)) >> np.uint64(64 - bits))
        while slots[slot] >= 0 and unique[slots[slot]] != ids[i]:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = found
            unique[found] = ids[i]
            found += 1
        places[i] = slots[slot]
    return unique[:found].copy(), places
