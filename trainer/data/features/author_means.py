"""Mean vector of all segments of an author that were known at a time: exact, for any time, in bounded memory.

The segments of an author are in the order in which they became known, so the mean at a time is that of the first few of
them. The sum of the vectors before every 64th segment of an author is kept. A mean needs one of these sums and at most
64 vectors.

The definition is a sum in float64 from the author's first segment on, one segment after the other. The kept sums are
partial sums of just this order, so a mean is the same bit for bit whatever else is read with it, and no segment that
becomes known later has a part in it.
"""

from __future__ import annotations

import numpy as np

from modules.compiled import compiled

BLOCK = 64
"""Segments of an author from one kept sum to the next: the sums of float16 vectors take a 16th of their memory."""

ROWS_AT_ONCE = 1 << 13
"""Number of vectors that are converted at a time."""


class AuthorMeans:
    """Means of the vectors of an author's first segments.

    Args:
        vectors: ``[rows, width]`` float16 or float32; may be memory-mapped. It is read once.
        order: ``[n]`` int64, rows by author, then by the time from which they are known.
        author_id: ``[n]`` int64, author of each element of ``order``.
    """

    def __init__(self, vectors: np.ndarray, order: np.ndarray, author_id: np.ndarray) -> None:
        self._vectors, self._order = vectors, order
        self._first = np.flatnonzero(np.append(True, author_id[1:] != author_id[:-1])[: len(order)])
        lengths = np.diff(self._first, append=len(order))
        blocks = -(-lengths // BLOCK)
        # Number of each block within its author.
        inside = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        self._begins = np.repeat(self._first, blocks) + BLOCK * inside
        self._sums = np.zeros((len(self._begins), vectors.shape[1]))
        restarts, kept = np.zeros(len(order), np.bool_), np.full(len(order), -1)
        restarts[self._first] = True
        kept[self._begins] = np.arange(len(self._begins))
        running = np.zeros(vectors.shape[1])
        for begin in range(0, len(order), ROWS_AT_ONCE):
            part = slice(begin, begin + ROWS_AT_ONCE)
            _keep_sums(self._take(order[part]), restarts[part], kept[part], running, self._sums)

    def read(self, last: np.ndarray, out: np.ndarray) -> None:
        """Write the mean of each author's vectors from its first one on.

        Args:
            last: ``[m]`` int64, index of the last vector of each mean in ``order``.
            out: ``[m, width]`` float32; written.
        """
        block = np.searchsorted(self._begins, last, "right") - 1
        begin = self._begins[block] if len(last) else last
        count = last + 1 - self._first[np.searchsorted(self._first, last, "right") - 1] if len(last) else last
        rows = last + 1 - begin
        for at in range(0, len(last), max(1, ROWS_AT_ONCE // BLOCK)):
            part = slice(at, at + max(1, ROWS_AT_ONCE // BLOCK))
            ends = np.cumsum(rows[part])
            places = np.arange(ends[-1]) + np.repeat(begin[part] - (ends - rows[part]), rows[part])
            _mean_of_blocks(
                self._take(self._order[places]), rows[part], count[part], self._sums[block[part]], out[part]
            )

    def prepare(self) -> None:
        """Compile the loop of :meth:`read`."""
        width = self._vectors.shape[1]
        none = np.zeros(0, np.int64)
        out = np.empty((0, width), np.float32)
        _mean_of_blocks(np.empty((0, width), np.float32), none, none, np.empty((0, width)), out)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        """Return vectors as float32, which holds every value of float16."""
        return np.take(self._vectors, rows, axis=0).astype(np.float32)


@compiled("the means of authors' segments", nogil=True)
def _keep_sums(
    vectors: np.ndarray, restarts: np.ndarray, kept: np.ndarray, running: np.ndarray, sums: np.ndarray
) -> None:
    """Add vectors to a running sum that restarts with each author, and keep it before some of them."""
    # Loops over the columns: numba takes several seconds to compile an assignment to a slice.
    for row in range(len(vectors)):
        if restarts[row]:
            for column in range(vectors.shape[1]):
                running[column] = 0
        if kept[row] >= 0:
            for column in range(vectors.shape[1]):
                sums[kept[row], column] = running[column]
        for column in range(vectors.shape[1]):
            running[column] += vectors[row, column]


@compiled("the means of authors' segments", nogil=True)
def _mean_of_blocks(
    vectors: np.ndarray, rows: np.ndarray, count: np.ndarray, sums: np.ndarray, out: np.ndarray
) -> None:
    """Add the next ``rows[i]`` vectors to ``sums[i]``, which is overwritten, and write its ``count[i]``-th part."""
    at = 0
    for i in range(len(rows)):
        for row in range(at, at + rows[i]):
            for column in range(vectors.shape[1]):
                sums[i, column] += vectors[row, column]
        at += rows[i]
        for column in range(vectors.shape[1]):
            out[i, column] = sums[i, column] / count[i]
