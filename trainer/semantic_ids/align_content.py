"""Content of authors as of a time: the mean of an author's segment vectors, and the latest of them.

Both see segments with ``known_ms <= as_of_ms`` only. A mean is a sum in the order in which the segments became known:
stored sums of the author's first 32, 64, ... segments, and the vectors after them one by one. So a segment that becomes
known later changes no bit of an earlier mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from trainer.console.errors import UserError
from trainer.data.features.segment_index import SegmentIndex
from trainer.runtime.compiled import compiled
from trainer.semantic_ids.segments import SegmentVectors, find_bad_vectors

SUMMED = 32
"""Segments between two stored sums of an author."""

CHUNK_ROWS = 1 << 16
"""Vectors that are read at a time."""

SCALE_ROWS = 1 << 16
"""Approximate number of vectors from which the scale is computed, evenly spaced over the training range."""


@dataclass(frozen=True)
class ContentIdentity:
    """Segment vectors that a model was trained on, as its run stores them.

    Attributes:
        table: path of the table.
        dim: number of elements of a vector.
        origin: hash or pooling of their origin; vectors with the same value may be mixed.
        hash: hash of ids and vectors.
        scale: divisor of the elements of the vectors: their root mean square in the training range.
    """

    table: str
    dim: int
    origin: str
    hash: str
    scale: float

    def check(self, segments: SegmentVectors, run: object) -> None:
        """Check that a model of these vectors can read others.

        Raises:
            UserError: they have another width, or another model made them.
        """
        table = segments.table
        if table.dim != self.dim:
            raise UserError(
                f"{table.path}: vectors have {table.dim} elements, and {run} was trained on {self.dim}; use vectors of "
                f"the same kind as {self.table}"
            )
        if (other := table.origin.hash or table.origin.pooling) != self.origin:
            raise UserError(
                f"{table.path}: vectors are from another model ({other or 'unknown'}) than those of {run} "
                f"({self.origin or 'unknown'}); use vectors of the same kind as {self.table}"
            )


@dataclass(frozen=True)
class AuthorContent:
    """Segment vectors by author, read as of a time. The object can be used in forked processes.

    Args:
        segments: vectors of a dataset's segments.
        scale: divisor of all elements.

    Raises:
        UserError: a vector is not finite or zero.
    """

    segments: SegmentVectors
    scale: float
    _index: SegmentIndex = field(init=False, repr=False)
    _starts: np.ndarray = field(init=False, repr=False)
    _first_sum: np.ndarray = field(init=False, repr=False)
    _sums: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        known, author = self.segments.known_ms, self.segments.author_id
        index = SegmentIndex(author, self.segments.item_id, known, known)
        by_author = author[index.order]
        starts = np.flatnonzero(np.append(True, by_author[1:] != by_author[:-1])[: len(by_author)])
        counts = np.diff(np.append(starts, len(by_author)))
        first_sum = np.cumsum(counts // SUMMED) - counts // SUMMED
        for name, value in (("_index", index), ("_starts", starts), ("_first_sum", first_sum)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_sums", self._make_sums(int((counts // SUMMED).sum())))

    @property
    def width(self) -> int:
        """Number of columns of :meth:`read`."""
        return 2 * self.segments.table.dim + 1

    def read(self, authors: np.ndarray, as_of_ms: np.ndarray, latest: np.ndarray | None = None) -> np.ndarray:
        """Return mean, latest vector and 1, or zeros for an author without a segment, ``[m, 2 * dim + 1]`` float32.

        Args:
            authors: ``[m]`` int64.
            as_of_ms: ``[m]`` int64.
            latest: ``[m]`` int64, rows of the table to read in place of the latest vectors.
        """
        dim, vectors = self.segments.table.dim, self.segments.table.vectors
        first, stop = self._index.span(authors, as_of_ms)
        some = np.flatnonzero(stop > first)
        first, stop = first[some], stop[some]
        whole = (stop - first) // SUMMED
        number = np.searchsorted(self._starts, first, side="right") - 1
        total = np.zeros((len(some), dim))
        summed = whole > 0
        total[summed] = self._sums[self._first_sum[number[summed]] + whole[summed] - 1]
        rest = stop - first - whole * SUMMED
        places = (
            np.repeat(first + whole * SUMMED, rest) + np.arange(rest.sum()) - np.repeat(np.cumsum(rest) - rest, rest)
        )
        _add_rows(np.asarray(vectors[self._index.order[places]], np.float32), rest, total)
        found = np.zeros((len(authors), self.width), np.float32)
        found[some, :dim] = total / (stop - first)[:, None] / self.scale
        row = self._index.order[stop - 1] if latest is None else latest[some]
        found[some, dim : 2 * dim] = vectors[row].astype(np.float32) / np.float32(self.scale)
        found[some, 2 * dim] = 1
        return found

    def _make_sums(self, count: int) -> np.ndarray:
        """Return the sums of each author's first 32, 64, ... segments, ``[count, dim]`` float32."""
        table, order = self.segments.table, self._index.order
        sums = np.empty((count, table.dim), np.float32)
        running, at = np.zeros(table.dim), 0
        is_start = np.zeros(len(order), bool)
        is_start[self._starts] = True
        in_author = 0
        for first in range(0, len(order), CHUNK_ROWS):
            rows = order[first : first + CHUNK_ROWS]
            vectors = np.asarray(table.vectors[rows], np.float32)
            find_bad_vectors(table.ids[rows], vectors).refuse(table.path, len(order))
            at, in_author = _sum_rows(
                vectors, is_start[first : first + CHUNK_ROWS], SUMMED, running, in_author, at, sums
            )
        return sums


def content_scale(segments: SegmentVectors, until_ms: int) -> float:
    """Return the root mean square of the elements of the vectors that became known before a time.

    Raises:
        UserError: no segment became known before it.
    """
    rows = np.flatnonzero(segments.known_ms < until_ms)
    if not len(rows):
        raise UserError(f"{segments.table.path}: no segment became known before the end of training")
    rows = np.unique(rows[np.linspace(0, len(rows) - 1, min(len(rows), SCALE_ROWS)).astype(np.int64)])
    squares = sum(float(np.square(part, dtype=np.float64).sum()) for part in _parts(segments, rows))
    return float(np.sqrt(squares / (len(rows) * segments.table.dim))) or 1.0


def _parts(segments: SegmentVectors, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the vectors of some rows in chunks, float32."""
    for first in range(0, len(rows), CHUNK_ROWS):
        yield np.asarray(segments.table.vectors[rows[first : first + CHUNK_ROWS]], np.float32)


@compiled(nogil=True)
def _add_rows(vectors: np.ndarray, counts: np.ndarray, total: np.ndarray) -> None:
    """Add the next ``counts[k]`` vectors to ``total[k]``, one after the other."""
    at = 0
    for row in range(len(counts)):
        for _ in range(counts[row]):
            for column in range(total.shape[1]):
                total[row, column] += vectors[at, column]
            at += 1


@compiled(nogil=True)
def _sum_rows(
    vectors: np.ndarray,
    is_start: np.ndarray,
    every: int,
    running: np.ndarray,
    in_author: int,
    at: int,
    sums: np.ndarray,
) -> tuple[int, int]:
    """Add vectors to the running sum of their author, and store it after every so many; returns the next places."""
    for row in range(len(vectors)):
        if is_start[row]:
            running[:] = 0
            in_author = 0
        for column in range(len(running)):
            running[column] += vectors[row, column]
        in_author += 1
        if in_author % every == 0:
            sums[at] = running
            at += 1
    return at, in_author
