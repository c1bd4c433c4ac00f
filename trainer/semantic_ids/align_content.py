"""Content of authors as of a time: the mean of an author's segment vectors, and the latest of them.

Both see segments with ``known_ms <= as_of_ms`` only, so a segment that becomes known later changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trainer.console.errors import UserError
from trainer.data.features.author_means import AuthorMeans
from trainer.data.features.segment_index import SegmentIndex
from trainer.data.format.content_vectors import Origin
from trainer.semantic_ids.segments import SegmentVectors, find_bad_vectors

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

    def check(self, place: object, dim: int, origin: Origin, run: object) -> None:
        """Check that a model of these vectors can read others.

        Args:
            place: of the other vectors, for the message.
            dim: number of their elements.
            origin: of them.
            run: directory of the model.

        Raises:
            UserError: they have another width, or another model made them.
        """
        if dim != self.dim:
            raise UserError(
                f"{place}: vectors have {dim} elements, and {run} was trained on {self.dim}; use vectors of "
                f"the same kind as {self.table}"
            )
        if (other := origin.hash or origin.pooling) != self.origin:
            raise UserError(
                f"{place}: vectors are from another model ({other or 'unknown'}) than those of {run} "
                f"({self.origin or 'unknown'}); use vectors of the same kind as {self.table}"
            )


class ContentSource(Protocol):
    """Source of the authors' content for the towers."""

    @property
    def dim(self) -> int:
        """Number of elements of a segment vector."""

    def prepare(self) -> None:
        """Do the work that forked processes can share."""

    def read(self, authors: np.ndarray, as_of_ms: np.ndarray, latest: np.ndarray | None = None) -> np.ndarray:
        """Return mean, latest vector and 1, or zeros for an author without a segment, ``[m, 2 * dim + 1]`` float32.

        Args:
            authors: ``[m]`` int64.
            as_of_ms: ``[m]`` int64.
            latest: ``[m]`` int64, places of vectors to read in place of the latest vectors.
        """


@dataclass(frozen=True)
class AuthorContent:
    """Segment vectors by author, read as of a time. The object can be used in forked processes.

    Args:
        segments: vectors of a dataset's segments, which :func:`check_vectors` accepts.
        scale: divisor of all elements.
    """

    segments: SegmentVectors
    scale: float
    _index: SegmentIndex = field(init=False, repr=False)
    _means: AuthorMeans = field(init=False, repr=False)

    def __post_init__(self) -> None:
        segments, table = self.segments, self.segments.table
        index = SegmentIndex(segments.author_id, segments.item_id, segments.start_ms, segments.known_ms)
        means = AuthorMeans(table.vectors, index.order, segments.author_id[index.order])
        for name, value in (("_index", index), ("_means", means)):
            object.__setattr__(self, name, value)

    def prepare(self) -> None:
        """Compile the loops, so that forked processes need not do it each."""
        self._means.prepare()
        self.read(np.zeros(1, np.int64), np.zeros(1, np.int64))

    @property
    def dim(self) -> int:
        """Number of elements of a segment vector."""
        return self.segments.table.dim

    def read(self, authors: np.ndarray, as_of_ms: np.ndarray, latest: np.ndarray | None = None) -> np.ndarray:
        """Return mean, latest vector and 1, or zeros for an author without a segment, ``[m, 2 * dim + 1]`` float32.

        Args:
            authors: ``[m]`` int64.
            as_of_ms: ``[m]`` int64.
            latest: ``[m]`` int64, rows of the table to read in place of the latest vectors.
        """
        dim, vectors = self.dim, self.segments.table.vectors
        first, stop = self._index.span(authors, as_of_ms)
        some = np.flatnonzero(stop > first)
        last = stop[some] - 1
        means = np.empty((len(some), dim), np.float32)
        self._means.read(last, means)
        row = self._index.order[last] if latest is None else latest[some]
        found = np.zeros((len(authors), content_width(dim)), np.float32)
        found[some, :dim] = means
        found[some, dim : 2 * dim] = vectors[row]
        found /= np.float32(self.scale)
        found[some, 2 * dim] = 1
        return found


def content_width(dim: int) -> int:
    """Return the number of columns that a :class:`ContentSource` of vectors of ``dim`` elements reads."""
    return 2 * dim + 1


def check_vectors(segments: SegmentVectors) -> None:
    """Check that all vectors can be averaged; it reads the whole table.

    Raises:
        UserError: a vector is not finite or zero.
    """
    table = segments.table
    for first in range(0, len(table), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        bad = find_bad_vectors(table.ids[rows], np.asarray(table.vectors[rows], np.float32))
        bad.refuse(table.path, len(table))


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
