"""Unique ids of an array, found by hashing instead of sorting."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from modules.compiled import compiled
from modules.search import cpu_intrinsics
from modules.search.cpu_intrinsics import prefetch

_GOLDEN = 0x9E3779B97F4A7C15
"""2 ** 64 divided by the golden ratio: it spreads the high bits of a product evenly (Knuth, volume 3, 6.4)."""

_AHEAD = 12
"""Ids between a request to memory and its use."""


@numba.njit(nogil=True)
def _first_slot(id_: int, bits: int) -> Any:
    """Return the first slot of an id among ``2 ** bits``."""
    return np.int64((np.uint64(id_) * np.uint64(_GOLDEN)) >> np.uint64(64 - bits))


@compiled("finding unique ids", cpu_intrinsics, nogil=True)
def find_unique(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the unique ids in order of first appearance, ``[unique]`` int64, and the place of each, ``[ids]`` int32.

    It uses a hash table with open addressing, at most half full, whose slots hold indices into the unique ids. Slots
    and unique ids do not fit into the first caches, and ids come in no order. So the slot of an id is requested from
    memory before it is read, and the unique id in it before it is compared.

    Args:
        ids: ``[ids]`` int64, fewer than 2 ** 31.
    """
    bits = 4
    while (1 << bits) < 2 * len(ids):
        bits += 1
    slots, mask, last = np.full(1 << bits, -1, np.int32), (1 << bits) - 1, len(ids) - 1
    unique, places, found = np.empty(len(ids), np.int64), np.empty(len(ids), np.int32), 0
    first_slot, first_unique = np.int64(slots.ctypes.data), np.int64(unique.ctypes.data)
    for i in range(len(ids)):
        prefetch(np.uintp(first_slot + 4 * _first_slot(ids[min(i + 2 * _AHEAD, last)], bits)))
        soon = slots[_first_slot(ids[min(i + _AHEAD, last)], bits)]
        prefetch(np.uintp(first_unique + 8 * (soon if soon > 0 else 0)))
        slot = _first_slot(ids[i], bits)
        while slots[slot] >= 0 and unique[slots[slot]] != ids[i]:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = found
            unique[found] = ids[i]
            found += 1
        places[i] = slots[slot]
    return unique[:found].copy(), places
