"""Vectors for k-means, read from disk in chunks, and the merge of equal vectors into one with a weight."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from modules.compiled import compiled
from trainer.console.errors import UserError

CHUNK_VALUES = 1 << 22
"""Elements of the vectors that are read at once: 32,768 vectors of 128 elements."""

SCATTERED_ROWS = 512
"""Vectors at scattered places of a file that are read before its pages are given back. The system maps the pages around
each of them, too: 64 KiB, so that 40,000 vectors would map a file of 2.5 GB."""


LARGEST_MAGNITUDE = 1e15
"""Largest element of a vector that a codebook takes: squares of norms stay finite in float32."""


class VectorChunk(NamedTuple):
    """Neighbouring vectors of a source: number of the first one, ``[m, dim]`` values, ``[m] int64`` weights."""

    first: int
    vectors: np.ndarray
    weights: np.ndarray


class VectorSource(Protocol):
    """Vectors of all ranks, numbered from 0; each rank reads a share of neighbouring numbers."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def count(self) -> int:
        """Number of vectors of all shares."""

    @property
    def dim(self) -> int:
        """Number of elements of a vector."""

    @property
    def digest(self) -> str:
        """Hash of vectors and weights: the same for any number of ranks."""

    def share(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return the first number of a rank's share, and the number after its last one. A share may be empty."""

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors of increasing numbers inside the share, ``[m, dim]`` float16 or float32, and weights."""


def chunks(source: VectorSource, first: int, stop: int) -> Iterator[VectorChunk]:
    """Yield the vectors with numbers from ``first`` to ``stop`` in chunks that fit in memory."""
    step = max(1, CHUNK_VALUES // source.dim)
    for begin in range(first, stop, step):
        numbers = np.arange(begin, min(begin + step, stop))
        yield VectorChunk(begin, *source.read(numbers))


@dataclass(frozen=True)
class StoredVectors:
    """Rows of an array of vectors, which may be memory-mapped.

    Attributes:
        name: name for messages, such as the path of the table.
        vectors: ``[n, dim]`` float16 or float32.
        table: hash of the array's content, such as that of a table of content vectors.
        rows: numbers of the rows that count, ``[m] int64``, increasing; all of them by default.
        weights: how many equal vectors each of these rows stands for, ``[m] int64``; 1 by default.
        borders: numbers at which the shares of the ranks begin and end, ``ranks + 1`` of them; equal shares by default.
    """

    name: str
    vectors: np.ndarray
    table: str
    rows: np.ndarray | None = None
    weights: np.ndarray | None = None
    borders: Sequence[int] | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Number of vectors of all shares."""
        return len(self.vectors if self.rows is None else self.rows)

    @property
    def dim(self) -> int:
        """Number of elements of a vector."""
        return int(self.vectors.shape[1])

    @property
    def digest(self) -> str:
        """Hash of vectors and weights."""
        digest = hashlib.blake2b(f"{self.table} {self.vectors.shape} {self.vectors.dtype}".encode(), digest_size=16)
        for name, values in (("rows", self.rows), ("weights", self.weights)):
            if values is not None:
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(values, np.int64).data)
        return digest.hexdigest()

    def share(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return the first number of a rank's share, and the number after its last one."""
        if self.borders is None:
            return self.count * rank // ranks, self.count * (rank + 1) // ranks
        return self.borders[rank], self.borders[rank + 1]

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of the vectors of increasing numbers, and their weights."""
        rows = numbers if self.rows is None else self.rows[numbers]
        vectors = _rows_of(self.vectors, rows)
        weights = np.ones(len(rows), np.int64) if self.weights is None else self.weights[numbers]
        return vectors, weights


def merge_equal(source: StoredVectors) -> StoredVectors:
    """Merge equal vectors into the first of them, whose weight is the sum of theirs; 0.0 and -0.0 are equal.

    Vectors with equal hashes are compared element by element. It takes 40 bytes of memory for each vector.
    """
    hashes = np.empty(source.count, np.uint64)
    for chunk in chunks(source, 0, source.count):
        hashes[chunk.first : chunk.first + len(chunk.vectors)] = hash_rows(chunk.vectors)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(order)])
    del hashes
    if len(starts) == source.count:
        return source
    first_of = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    del starts
    same = _equal_pairs(source, order, first_of)
    sums = np.zeros(source.count, np.int64)
    for part in _parts(np.flatnonzero(same), CHUNK_VALUES):
        np.add.at(sums, first_of[part], _weights_of(source, order[part]))
    for place in np.flatnonzero(~same):
        # Another vector has the hash of this one. It joins the first of its equals that were left over, maybe itself.
        number, others = order[place], order[(first_of == first_of[place]) & ~same]
        twins = (_vectors_of(source, others) == _vectors_of(source, order[place : place + 1])).all(1)
        sums[others[np.argmax(twins)]] += _weights_of(source, number)
    kept = np.flatnonzero(sums)
    return StoredVectors(
        source.name, source.vectors, source.table, kept if source.rows is None else source.rows[kept], sums[kept]
    )


def hash_rows(vectors: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each row, ``[n, d] -> [n] uint64``; equal numbers have equal hashes."""
    words = np.ascontiguousarray(vectors).view(f"u{vectors.dtype.itemsize}")
    result = np.empty(len(words), np.uint64)
    _hash_words(words, words.dtype.type(1 << (8 * words.itemsize - 1)), result)
    return result


@compiled("hashing vectors", nogil=True)
def _hash_words(words: np.ndarray, negative_zero: int, result: np.ndarray) -> None:
    """Hash rows of the bits of floating-point numbers: a multiplication and a shift for each number."""
    for row in range(len(words)):
        total = np.uint64(0x9E3779B97F4A7C15)
        for word in words[row]:
            total ^= np.uint64(0) if word == negative_zero else np.uint64(word)
            total *= np.uint64(0xFF51AFD7ED558CCD)
            total ^= total >> np.uint64(32)
        result[row] = total


class Checked(NamedTuple):
    """Numbers of vectors that are not finite and that are zero, largest magnitude of the others, sum of weights."""

    not_finite: int
    zero: int
    largest: float
    weight: int


def check_vectors(source: VectorSource, first: int, stop: int) -> Checked:
    """Read a range of vectors once and count what is wrong with them."""
    not_finite = zero = weight = 0
    largest = 0.0
    for chunk in chunks(source, first, stop):
        kind = np.finfo(chunk.vectors.dtype)
        # Bits of magnitudes are ordered like the magnitudes, then infinity, then NaN.
        bits = chunk.vectors.view(f"u{kind.dtype.itemsize}") & ((1 << (kind.bits - 1)) - 1)
        top = np.ascontiguousarray(bits.max(1, initial=0)).view(kind.dtype)
        finite = np.isfinite(top)
        not_finite += int((~finite).sum())
        zero += int((top == 0).sum())
        largest = max(largest, float(top[finite].max(initial=0)))
        weight += int(chunk.weights.sum())
    return Checked(not_finite, zero, largest, weight)


def find_finite(vectors: np.ndarray) -> np.ndarray:
    """Return a mask ``[n]`` of the vectors whose elements are finite and at most ``LARGEST_MAGNITUDE``."""
    largest = vectors.dtype.type(min(LARGEST_MAGNITUDE, float(np.finfo(vectors.dtype).max)))
    return (np.abs(vectors) <= largest).all(axis=1)


def check_dim(name: str, found: int, wanted: int) -> None:
    """Check the width of vectors.

    Raises:
        UserError: the vectors have another number of elements than the centroids.
    """
    if found != wanted:
        raise UserError(f"{name}: vectors of {found} elements, but the codebook's centroids have {wanted}")


def _rows_of(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return copies of rows, and give the pages of a memory map back to the system."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        found = np.array(vectors[rows[0] : rows[-1] + 1])
        _release(vectors)
        return found
    found = np.empty((len(rows), vectors.shape[1]), vectors.dtype)
    for places in _parts(np.arange(len(rows)), SCATTERED_ROWS):
        found[places] = vectors[rows[places]]
        _release(vectors)
    return found


def _release(vectors: np.ndarray) -> None:
    """Unmap the pages of a memory map: while mapped they count as memory, although the system may drop them."""
    mapped = getattr(vectors, "_mmap", None)
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


def _vectors_of(source: StoredVectors, numbers: np.ndarray) -> np.ndarray:
    """Return the vectors of numbers in any order."""
    return _rows_of(source.vectors, numbers if source.rows is None else source.rows[numbers])


def _weights_of(source: StoredVectors, numbers: np.ndarray) -> np.ndarray | int:
    return 1 if source.weights is None else source.weights[numbers]


def _equal_pairs(source: StoredVectors, order: np.ndarray, first_of: np.ndarray) -> np.ndarray:
    """Return a mask of the places of ``order`` whose vector equals that of ``first_of``."""
    same = order == first_of
    for part in _parts(np.flatnonzero(~same), max(1, CHUNK_VALUES // max(1, source.dim))):
        same[part] = (_vectors_of(source, order[part]) == _vectors_of(source, first_of[part])).all(1)
    return same


def _parts(places: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for begin in range(0, len(places), size):
        yield places[begin : begin + size]
