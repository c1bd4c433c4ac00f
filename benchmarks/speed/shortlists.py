"""Approximate searches of long histories: only the entries of a short list are scored exactly.

* :class:`HashCodes`, after ETA (Chen et al., 2021): each item has a code of random hyperplanes; the list holds the
  entries whose codes differ from the candidate's in the fewest bits. It reads a few bytes an entry, not a vector.
* :class:`Clusters`, after TWIN-V2 (Si et al., 2024): each history is cut into clusters of similar items, ahead of time;
  the list holds the entries of the clusters whose means have the largest dot products. It reads a vector a cluster.

``benchmarks/speed/search.py`` measures their recall and time. They stand here and not in ``modules/search``, since
neither beats the exact search below 100,000 visits on a CPU, and a job reads 10,000.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numba
import numpy as np
import torch

from modules.search.cpu_intrinsics import GROUP, LANES, bits_set, dots_half
from modules.search.cpu_kernels import (
    AHEAD,
    fetch,
    int_of_key,
    keep_best,
    key_of_float,
    key_of_int,
    place_of,
    row_of,
    write_all,
)
from modules.search.search import SearchPart, SearchResult, SearchVectors, arguments_of, search, top

_CHUNK_ROWS = 1 << 16
_LLOYD_STEPS = 4
_WORD = 64


class Shortlist(Protocol):
    """Finds entries that may be the best faster than a look at each of them."""

    def shortlist(self, first: np.ndarray, stop: np.ndarray, length: int, part: SearchPart) -> SearchResult:
        """Return the entries among which the best ``length`` of each run are looked for, ascending in each row."""


def top_of_shortlist(
    first: np.ndarray, stop: np.ndarray, length: int, part: SearchPart, shortlist: Shortlist
) -> SearchResult:
    """Return the entries of each run with the largest scores among those of a short list.

    Args:
        first: ``[n]`` int64: begins of the runs.
        stop: ``[n]`` int64: their ends.
        length: most entries of a row.
        part: the dot products.
        shortlist: chooses the entries that are scored.
    """
    at, lengths = shortlist.shortlist(first, stop, length, part)
    ends = np.cumsum(lengths)
    found = top(ends - lengths, ends, length, part._replace(column=part.column[at]))
    return SearchResult(at[found.at], found.lengths)


class HashCodes(NamedTuple):
    """Codes of all items.

    Attributes:
        codes: ``[rows, words]`` uint64, one for each row of the search vectors.
        oversample: entries of the list for each entry of the result; 1 is ETA as published.
    """

    codes: np.ndarray
    oversample: int = 4

    @staticmethod
    def of(vectors: SearchVectors, bits: int, seed: int, oversample: int = 4) -> HashCodes:
        """Return codes of ``bits`` random hyperplanes: the sides on which each vector lies.

        Raises:
            ValueError: ``bits`` is not a positive multiple of 64.
        """
        if bits % _WORD or bits <= 0:
            raise ValueError(f"codes must have a multiple of {_WORD} bits, not {bits}")
        rows, width = vectors.values.shape
        planes = torch.randn(width, bits, generator=torch.Generator().manual_seed(seed)).numpy()
        codes = np.empty((rows, bits // _WORD), np.uint64)
        for begin in range(0, rows, _CHUNK_ROWS):
            sides = vectors.values[begin : begin + _CHUNK_ROWS].astype(np.float32) @ planes > 0
            codes[begin : begin + _CHUNK_ROWS] = np.packbits(sides, axis=1, bitorder="little").view(np.uint64)
        return HashCodes(codes, oversample)

    def shortlist(self, first: np.ndarray, stop: np.ndarray, length: int, part: SearchPart) -> SearchResult:
        """Return the entries whose codes differ least from the candidate's; of equal ones the later."""
        query = self.codes[part.vectors.rows(part.candidate)]
        return search(
            _nearest_codes, length * self.oversample, first, stop, part.column, part.vectors.shift, self.codes, query
        )


class Clusters(NamedTuple):
    """Histories cut into clusters.

    A run is clustered up to a moment. Its clusters are used only where all of these entries are known.

    Attributes:
        first: ``[runs]`` int64, ascending: begins of the runs.
        stop: ``[runs]`` int64: ends of their clustered entries.
        cluster: ``[runs + 1]`` int64: begins of each run's clusters.
        means: ``[clusters, width]`` float16.
        member: ``[clusters + 1]`` int64: begins of each cluster's members.
        members: positions of the entries, ascending in each cluster.
        oversample: about the entries of the list for each entry of the result.
    """

    first: np.ndarray
    stop: np.ndarray
    cluster: np.ndarray
    means: np.ndarray
    member: np.ndarray
    members: np.ndarray
    oversample: int = 8

    @staticmethod
    def of(
        first: np.ndarray, stop: np.ndarray, column: np.ndarray, vectors: SearchVectors, size: int, oversample: int = 8
    ) -> Clusters:
        """Cut runs into clusters of at most ``size`` entries by repeated 2-means; slow, to be done ahead of time.

        Args:
            first: ``[runs]`` int64, ascending: begins of the runs.
            stop: ``[runs]`` int64: their ends; a search that uses the clusters must know all of these entries.
            column: ids of the history's entries.
            vectors: float16.
            size: most entries of a cluster.
            oversample: see :class:`Clusters`.
        """
        means = [np.empty((0, vectors.values.shape[1]), np.float32)]
        sizes, members, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
        for low, high in zip(first.tolist(), stop.tolist(), strict=True):
            values = vectors.values[vectors.rows(column[low:high])].astype(np.float32)
            order, ends = _split(values, size)
            begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
            # Members ascend within each cluster.
            order = order[np.lexsort((order, np.repeat(np.arange(len(ends)), ends - begins)))]
            means.append(np.add.reduceat(values[order], begins, axis=0) / (ends - begins)[:, None])
            sizes.append(ends - begins)
            members.append(low + order)
            counts.append(len(ends))
        return Clusters(
            first,
            stop,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.concatenate(means).astype(np.float16),
            np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64),
            np.concatenate(members),
            oversample,
        )

    def shortlist(self, first: np.ndarray, stop: np.ndarray, length: int, part: SearchPart) -> SearchResult:
        """Return the members of the best clusters and all later entries; whole runs where clusters are not usable."""
        run = np.searchsorted(self.first, first, side="right") - 1
        if len(self.first):
            covered = (run >= 0) & (first < self.stop[run]) & (stop >= self.stop[run])
            run = np.where(covered, run, -1)
        wanted = length * self.oversample
        since = np.where(run >= 0, self.stop[run] if len(self.first) else 0, first)
        largest = int(np.diff(self.member).max(initial=0))
        capacity = int((np.where(run >= 0, wanted + largest, 0) + stop - since).max(initial=0))
        _, _, _, query = arguments_of(part)
        return search(
            _best_clusters,
            capacity,
            first,
            stop,
            run,
            wanted,
            self.stop,
            self.cluster,
            self.means.view(np.uint16),
            self.member,
            self.members,
            query,
        )


@numba.njit(nogil=True)
def _nearest_codes(
    begin: int,
    end: int,
    first: np.ndarray,
    stop: np.ndarray,
    column: np.ndarray,
    shift: int,
    codes: np.ndarray,
    query: np.ndarray,
    out: np.ndarray,
    lengths: np.ndarray,
) -> None:
    rows, words = codes.shape
    base, row_bytes, length = codes.ctypes.data, words * codes.itemsize, out.shape[1]
    keys = np.empty(4 * length + 64, np.uint64)
    for row in range(begin, end):
        low, high = first[row], stop[row]
        lengths[row] = min(high - low, length)
        if high - low <= length:
            write_all(low, high, out[row])
            continue
        count, floor = 0, np.int32(-(1 << 31))
        for at in range(high - 1, low - 1, -1):
            if at - AHEAD * GROUP >= low:
                fetch(base, row_of(column, at - AHEAD * GROUP, shift, rows) * row_bytes, row_bytes)
            code = codes[row_of(column, at, shift, rows)]
            alike = np.int32(0)
            for word in range(words):
                alike -= np.int32(bits_set(code[word] ^ query[row, word]))
            if alike > floor:
                keys[count] = key_of_int(alike, at - low)
                count += 1
                if count == len(keys):
                    floor = int_of_key(keep_best(keys, count, length, length)[1])
                    count = length
        if count > length:
            keep_best(keys, count, length, length)
        for i in range(length):
            out[row, length - 1 - i] = low + place_of(keys[i])


@numba.njit(nogil=True)
def _best_clusters(
    begin: int,
    end: int,
    first: np.ndarray,
    stop: np.ndarray,
    run: np.ndarray,
    wanted: int,
    clustered: np.ndarray,
    cluster: np.ndarray,
    means: np.ndarray,
    member: np.ndarray,
    members: np.ndarray,
    query: np.ndarray,
    out: np.ndarray,
    lengths: np.ndarray,
) -> None:
    width = means.shape[1]
    base, row_bytes, blocks = means.ctypes.data, width * means.itemsize, width // LANES
    capacity = out.shape[1]
    offsets, scores = np.empty(GROUP, np.int64), np.empty(GROUP, np.float32)
    for row in range(begin, end):
        low, high = first[row], stop[row]
        if run[row] < 0:
            write_all(low, high, out[row])
            lengths[row] = high - low
            continue
        since = clustered[run[row]]
        begins, ends = cluster[run[row]], cluster[run[row] + 1]
        keys = np.empty(ends - begins, np.uint64)
        for group in range(begins, ends, GROUP):
            for i in range(GROUP):
                offsets[i] = min(group + i, ends - 1) * row_bytes
            dots_half(base, offsets.ctypes.data, query[row].ctypes.data, blocks, scores.ctypes.data)
            for each in range(group, min(group + GROUP, ends)):
                keys[each - begins] = key_of_float(scores[each - group], each - begins)
        keys.sort()
        listed = np.empty(capacity, np.int64)
        count = 0
        for i in range(len(keys) - 1, -1, -1):
            if count >= wanted:
                break
            best = begins + place_of(keys[i])
            for place in range(member[best], member[best + 1]):
                # A user's entries before the last 10,000 are not searched.
                if members[place] >= low:
                    listed[count] = members[place]
                    count += 1
        found = np.sort(listed[:count])
        total = count + high - since
        out[row, capacity - total : capacity - total + count] = found
        write_all(since, high, out[row])
        lengths[row] = total


@numba.njit(nogil=True)
def _split(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of ``values [n, width]`` cluster by cluster, and the end of each cluster."""
    n, width = values.shape
    order, spare = np.arange(n), np.empty(n, np.int64)
    ends = [np.int64(0) for _ in range(0)]
    waiting = [(0, n)]
    centres, sums = np.empty((2, width), np.float32), np.empty((2, width), np.float32)
    while len(waiting):
        low, high = waiting.pop()
        if high - low <= size:
            if high > low:
                ends.append(high)
            continue
        # Start with two entries far apart: the one farthest from the first, and the one farthest from that.
        centres[0] = values[order[low]]
        for _ in range(2):
            farthest, distance = low, np.float32(-1)
            for i in range(low, high):
                apart = _distance(values[order[i]], centres[0])
                if apart > distance:
                    farthest, distance = i, apart
            centres[1] = centres[0]
            centres[0] = values[order[farthest]]
        left = low
        for _ in range(_LLOYD_STEPS):
            left, right = low, high
            sums[:] = 0
            for i in range(low, high):
                here = values[order[i]]
                side = 0 if _distance(here, centres[0]) <= _distance(here, centres[1]) else 1
                sums[side] += here
                if side == 0:
                    spare[left] = order[i]
                    left += 1
                else:
                    right -= 1
                    spare[right] = order[i]
            order[low:high] = spare[low:high]
            if left in (low, high):
                break
            centres[0] = sums[0] / np.float32(left - low)
            centres[1] = sums[1] / np.float32(high - left)
        if left in (low, high):
            # All entries are equal.
            left = (low + high) // 2
        waiting.append((left, high))
        waiting.append((low, left))
    return order, np.array(ends)


@numba.njit(nogil=True)
def _distance(one: np.ndarray, other: np.ndarray) -> np.float32:
    total = np.float32(0)
    for i in range(len(one)):
        total += (one[i] - other[i]) ** 2
    return total
