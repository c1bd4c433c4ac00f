"""Search loops over the rows of a batch, compiled by numba; entries are read once and their scores are not stored.

Entries are read from the latest to the oldest. An entry that may still be among the best goes into a short list, as one
64-bit key of score and place. The list is cut to the best entries whenever it is full. All keys are different; a key is
larger if the score is larger or, for the same score, if the entry is later.

A row's result is written to the end of its row of ``out``, oldest entry first.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from modules.compiled import compiled
from modules.search.cpu_intrinsics import (
    CACHE_LINE,
    GROUP,
    LANES,
    dots_byte,
    dots_half,
    prefetch,
    push_above,
    request,
)

AHEAD = 6
"""Groups of entries whose vectors are prefetched; more than a core's outstanding reads would gain nothing."""

WORK = "searches of histories"
"""Work of the kernels, for the message when they are compiled."""

_TOP_BIT = np.uint32(1 << 31)
_PLACE_BITS = np.uint64(32)


@numba.njit(nogil=True)
def key_of_float(score: np.float32, place: int) -> np.uint64:
    """Return the key of a float score: bits that are ordered like the float, then the place. No NaN and no -0."""
    bits = np.float32(score).view(np.uint32)
    ordered = ~bits if bits & _TOP_BIT else bits | _TOP_BIT
    return (np.uint64(ordered) << _PLACE_BITS) | np.uint64(place)


@numba.njit(nogil=True)
def float_of_key(key: np.uint64) -> np.float32:
    """Return the score of a key of :func:`key_of_float`."""
    ordered = np.uint32(key >> _PLACE_BITS)
    return np.uint32(ordered ^ _TOP_BIT if ordered & _TOP_BIT else ~ordered).view(np.float32)


@numba.njit(nogil=True)
def key_of_int(score: np.int32, place: int) -> np.uint64:
    """Return the key of an integer score."""
    return (np.uint64(np.uint32(score) ^ _TOP_BIT) << _PLACE_BITS) | np.uint64(place)


@numba.njit(nogil=True)
def int_of_key(key: np.uint64) -> np.int32:
    """Return the score of a key of :func:`key_of_int`."""
    return np.int32(np.uint32(key >> _PLACE_BITS) ^ _TOP_BIT)


@numba.njit(nogil=True)
def place_of(key: np.uint64) -> np.int64:
    """Return the place of a key."""
    return np.int64(key & np.uint64(0xFFFFFFFF))


@numba.njit(nogil=True)
def least_of_best(keys: np.ndarray, count: int, keep: int, most: int) -> np.uint64:
    """Return the smallest of the best ``keep`` to ``most`` of the first ``count`` different keys.

    Its bits are found from the highest to the lowest: a bit is set if ``keep`` keys are not below the number then.
    Counting has no branches and is compiled to vector instructions, so a pass over some hundred keys takes less time
    than a few mispredicted branches of a partition.
    """
    low, high = keys[0], keys[0]
    for i in range(count):
        low, high = min(low, keys[i]), max(high, keys[i])
    bound = np.uint64(0)
    for bit in range(63, -1, -1):
        tried = bound | (np.uint64(1) << np.uint64(bit))
        if (low ^ high) >> np.uint64(bit) == 0:  # All keys have this bit and those before it in common.
            bound = tried if tried <= low else bound
            continue
        reached = 0
        for i in range(count):
            reached += int(keys[i] >= tried)
        if reached >= keep:
            bound = tried
            if reached <= most:
                break
    least = high
    for i in range(count):
        least = min(least, keys[i]) if keys[i] >= bound else least
    return least


@numba.njit(nogil=True)
def keep_best(keys: np.ndarray, count: int, keep: int, most: int) -> tuple[int, np.uint64]:
    """Cut a list to its best keys, without changing their order.

    Args:
        keys: the list; all keys are different.
        count: keys in the list, at least ``keep``.
        keep: smallest number of keys that are left.
        most: largest number; a cut to an exact number takes longer.

    Returns:
        The number of keys that are left, and the smallest of them.
    """
    least = least_of_best(keys, count, keep, most)
    kept = 0
    for i in range(count):
        key = keys[i]
        keys[kept] = key
        kept += int(key >= least)
    return kept, least


@numba.njit(nogil=True)
def write_all(first: int, stop: int, out: np.ndarray) -> None:
    """Write all entries of a run as its result."""
    end = len(out) - (stop - first)
    for i in range(stop - first):
        out[end + i] = first + i


@numba.njit(nogil=True)
def row_of(column: np.ndarray, at: int, shift: int, rows: int) -> int:
    """Return the row of an entry's vector; 0 if it has none."""
    # Unsigned: numba then adds no code for negative indices, and a negative row counts as beyond the table.
    row = column[np.uintp(at)] + shift
    return row if np.uint64(row) < np.uint64(rows) else 0


@numba.njit(nogil=True)
def fetch(base: int, offset: int, row_bytes: int) -> None:
    """Prefetch a vector; its first cache lines without a loop, which would cost as much as the prefetch."""
    address = np.uintp(base + offset)
    prefetch(address)
    if row_bytes > CACHE_LINE:
        prefetch(address + np.uintp(CACHE_LINE))
        for line in range(2 * CACHE_LINE, row_bytes, CACHE_LINE):
            prefetch(address + np.uintp(line))


@numba.njit(nogil=True)
def seek(
    latest: int,
    low: int,
    column: np.ndarray,
    shift: int,
    rows: int,
    base: int,
    row_bytes: int,
    offsets: np.ndarray,
    slot: int,
) -> None:
    """Write the offsets of a group's vectors, from entry ``latest`` backwards, and prefetch the vectors.

    Entries before ``low``, the first of the run, get the offset of ``low``.
    """
    for i in range(GROUP):
        offsets[slot, i] = row_of(column, max(latest - i, low), shift, rows) * row_bytes
    for i in range(GROUP):
        fetch(base, offsets[slot, i], row_bytes)


def make_top(dots: Callable, key_of: Callable, score_of: Callable, lowest: np.float32 | np.int32) -> Callable:
    """Make the kernel that searches for the largest dot products, for one type of vectors.

    Args:
        dots: ``(address of the vectors, address of offsets, address of the query, blocks, address of the scores)``.
        key_of: ``(score, place) -> key``.
        score_of: ``key -> score``.
        lowest: a value below every score.

    Returns:
        ``top(begin, end, first, stop, parts, column, shift, vectors, query, column_2, shift_2, vectors_2, query_2, out,
        lengths)``, compiled. With 2 parts a score is the sum of two dot products; with 1 the arguments of the second
        are not used.
    """
    score_type = type(lowest)

    @compiled(WORK, nogil=True, keep=False)
    def top(
        begin: int,
        end: int,
        first: np.ndarray,
        stop: np.ndarray,
        parts: int,
        column: np.ndarray,
        shift: int,
        vectors: np.ndarray,
        query: np.ndarray,
        column_2: np.ndarray,
        shift_2: int,
        vectors_2: np.ndarray,
        query_2: np.ndarray,
        out: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        rows, width = vectors.shape
        base, row_bytes, blocks = vectors.ctypes.data, width * vectors.itemsize, width // LANES
        rows_2, width_2 = vectors_2.shape
        base_2, row_bytes_2, blocks_2 = vectors_2.ctypes.data, width_2 * vectors_2.itemsize, width_2 // LANES
        both, length = parts == 2, out.shape[1]
        # The list may grow by a group beyond its capacity before it is cut.
        capacity = 3 * length + 64
        keys = np.empty(capacity + 2 * GROUP, np.uint64)
        offsets, offsets_2 = np.empty((AHEAD, GROUP), np.int64), np.empty((AHEAD, GROUP), np.int64)
        scores, scores_2 = np.empty(GROUP, score_type), np.empty(GROUP, score_type)
        # Addresses and not array views: each view would change a reference count.
        group_bytes = GROUP * offsets.itemsize
        at_offsets, at_offsets_2 = offsets.ctypes.data, offsets_2.ctypes.data
        at_keys = keys.ctypes.data
        at_scores, at_scores_2 = scores.ctypes.data, scores_2.ctypes.data
        for row in range(begin, end):
            low, high = first[row], stop[row]
            lengths[row] = min(high - low, length)
            if high - low <= length:
                write_all(low, high, out[row])
                continue
            address, address_2 = query[row].ctypes.data, query_2[row].ctypes.data
            count, floor, slot = 0, lowest, 0
            for latest in range(high - 1, low - 1 - AHEAD * GROUP, -GROUP):
                # The loop prefetches AHEAD groups in advance: it scores the group that was prefetched in this slot, and
                # then prefetches another one into the slot.
                here = latest + AHEAD * GROUP
                if here < high:
                    dots(base, at_offsets + slot * group_bytes, address, blocks, at_scores)
                    if both:
                        dots(base_2, at_offsets_2 + slot * group_bytes, address_2, blocks_2, at_scores_2)
                        for i in range(GROUP):
                            scores[i] += scores_2[i]
                    # A score equal to the worst one in the list does not count: all entries of the list are later.
                    count += push_above(at_scores, floor, here - low, at_keys + count * keys.itemsize)
                    if count > capacity:
                        count, least = keep_best(keys, count, length, length + length // 4)
                        floor = score_of(least)
                if latest >= low + GROUP - 1:
                    request(column, latest, shift, rows, base, row_bytes, at_offsets + slot * group_bytes)
                    if both:
                        place_2 = at_offsets_2 + slot * group_bytes
                        request(column_2, latest, shift_2, rows_2, base_2, row_bytes_2, place_2)
                elif latest >= low:
                    seek(latest, low, column, shift, rows, base, row_bytes, offsets, slot)
                    if both:
                        seek(latest, low, column_2, shift_2, rows_2, base_2, row_bytes_2, offsets_2, slot)
                slot = (slot + 1) % AHEAD
            if count > length:
                keep_best(keys, count, length, length)
            for i in range(length):
                out[row, length - 1 - i] = low + place_of(keys[i])

    return top


top_half = make_top(dots_half, key_of_float, float_of_key, np.float32(-np.inf))
"""Kernel for float16 vectors, passed as uint16, and float32 queries."""

top_byte = make_top(dots_byte, key_of_int, int_of_key, np.int32(-(1 << 31)))
"""Kernel for int8 vectors and queries."""


@compiled(WORK, nogil=True)
def same_author(
    begin: int,
    end: int,
    first: np.ndarray,
    stop: np.ndarray,
    author_id: np.ndarray,
    candidate_author: np.ndarray,
    out: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Find the latest entries of the candidate's author."""
    length = out.shape[1]
    for row in range(begin, end):
        free = length
        for at in range(stop[row] - 1, first[row] - 1, -1):
            if author_id[at] == candidate_author[row]:
                free -= 1
                out[row, free] = at
                if free == 0:
                    break
        lengths[row] = length - free


@compiled(WORK, nogil=True)
def latest_of_all(
    begin: int,
    end: int,
    first: np.ndarray,
    stop: np.ndarray,
    ordinal: np.ndarray,
    bits: np.ndarray,
    require: int,
    out: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Find the latest entries by ``ordinal`` over several runs of each user that have one of the bits of ``require``.

    With ``require`` 0 all entries count.
    """
    length = out.shape[1]
    ends = np.empty(first.shape[1], np.int64)
    for row in range(begin, end):
        for run in range(len(ends)):
            ends[run] = stop[row, run]
        free = length
        while free:
            latest, place = -1, -1
            for run in range(len(ends)):
                if ends[run] > first[row, run] and ordinal[ends[run] - 1] > place:
                    latest, place = run, ordinal[ends[run] - 1]
            if latest < 0:
                break
            ends[latest] -= 1
            if require == 0 or bits[ends[latest]] & require:
                free -= 1
                out[row, free] = ends[latest]
        lengths[row] = length - free
