"""General search units (GSU): find the entries of a long history to compare with a candidate (Moment&Cross, 3.2).

These are the five searches of the paper, over the histories of a batch's users:

===========  ==================================================================================================
short        the latest short videos: :func:`latest`
long         the short videos with the largest dot product with the candidate: :func:`top`
author       the latest short videos of the candidate's author: :func:`same_author`
live_long    the live rooms with the largest dot product with the candidate: :func:`top`
mixed        the latest visits of both domains with a positive long view: :func:`latest_of_all`
===========  ==================================================================================================

A history is one run ``[first, stop)`` of flat columns, in order of time. A search returns places in these columns,
oldest first, at most ``length`` for each row, and fewer or none if the history has no more. Of entries with the same
score the later one is taken. ``modules/search/reference.py`` defines the results in plain PyTorch; this module finds
the same entries:

* int8: a score is the dot product in integers, which is exact.
* float16: the products are exact in float32. Lane l of 16 sums the products at ``l, l + 16, ...`` in order, in float32;
  then lanes l and l + 8 are added, then l and l + 4, l + 2, l + 1.
* The scores of two parts are added, in float32 or in integers.

The rows are divided among ``torch.get_num_threads()`` threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from modules.search import cpu_kernels
from modules.search.cpu_intrinsics import LANES
from modules.threads import each_part


class SearchResult(NamedTuple):
    """Entries that a search found for n rows.

    Attributes:
        at: places in the columns of the history, row after row and ascending in each row; ``[lengths.sum()]`` int64.
        lengths: number of entries of each row, ``[n]`` int64.
    """

    at: np.ndarray
    lengths: np.ndarray


class SearchVectors(NamedTuple):
    """Vectors of all items, or of all authors, that are compared by dot product.

    Attributes:
        values: ``[rows, width]`` float16, all finite, or int8; ``width`` is a multiple of 16 (:func:`padded_width`).
            Row 0 is zeros and serves ids without a vector: they score 0, so a candidate without a vector finds the
            latest entries.
        shift: added to the id in a history to get its row.
    """

    values: np.ndarray
    shift: int = 0

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of some ids; 0 for ids outside the table."""
        rows = ids + self.shift
        return np.where((rows > 0) & (rows < len(self.values)), rows, 0)


class SearchPart(NamedTuple):
    """One part of a score: dot products between the entries of histories and n candidates.

    Attributes:
        column: column of the history, int64 or int32: ids of its entries.
        candidate: ``[n]`` int64, ids of the candidates.
        vectors: vectors of the ids.
    """

    column: np.ndarray
    candidate: np.ndarray
    vectors: SearchVectors


def padded_width(dim: int) -> int:
    """Return the width of a search vector of ``dim`` dimensions, the next multiple of 16; zeros fill the rest."""
    return -(-dim // LANES) * LANES


def latest(first: np.ndarray, stop: np.ndarray, length: int) -> SearchResult:
    """Find the latest entries of each run.

    Args:
        first: ``[n]`` int64, first place of each run.
        stop: ``[n]`` int64, place after the last one of each run.
        length: largest number of entries of a row.
    """
    lengths = np.minimum(stop - first, length)
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(stop - ends, lengths)
    return SearchResult(at, lengths)


def same_author(
    first: np.ndarray, stop: np.ndarray, length: int, author_id: np.ndarray, candidate_author: np.ndarray
) -> SearchResult:
    """Find the latest entries of each run whose author is the candidate's.

    Args:
        first, stop, length: see :func:`latest`.
        author_id: column of the history, int64.
        candidate_author: ``[n]`` int64.
    """
    return search(cpu_kernels.same_author, length, first, stop, author_id, candidate_author)


def latest_of_all(
    first: np.ndarray, stop: np.ndarray, length: int, ordinal: np.ndarray, bits: np.ndarray, require: int = 0
) -> SearchResult:
    """Find the latest entries over several runs of each user.

    Args:
        first: ``[n, runs]`` int64, first place of each run.
        stop: ``[n, runs]`` int64, place after the last one of each run.
        length: largest number of entries of a row.
        ordinal: column of the history, int32: order in time of a user's entries, over all runs.
        bits: column of the history, int32: behaviours of a visit, as bits.
        require: only entries with one of these bits are found; 0 for all entries.

    Returns:
        ``SearchResult.at`` of a row is in order of time, and not ascending.
    """
    return search(cpu_kernels.latest_of_all, length, first, stop, ordinal, bits, require)


def top(first: np.ndarray, stop: np.ndarray, length: int, *parts: SearchPart) -> SearchResult:
    """Find the entries of each run with the largest scores.

    Args:
        first, stop, length: see :func:`latest`.
        parts: one part, or two whose dot products are added, for example of items and of their authors. The vectors of
            both have the same type.

    Raises:
        ValueError: the vectors have a wrong type or width, or there are more than two parts.
    """
    dtypes = {part.vectors.values.dtype for part in parts}
    if len(parts) not in (1, 2) or len(dtypes) > 1:
        raise ValueError(f"a search has one or two parts of one type, not {len(parts)} of {len(dtypes)}")
    kernel = cpu_kernels.top_half if np.dtype(np.float16) in dtypes else cpu_kernels.top_byte
    arguments = [argument for part in parts for argument in arguments_of(part)]
    return search(kernel, length, first, stop, len(parts), *(arguments * 2)[:8])


def arguments_of(part: SearchPart) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Return column, shift, vectors and the candidates' vectors in the form that the kernels take.

    Raises:
        ValueError: the vectors have a wrong type or width.
    """
    values, shift = part.vectors
    if values.dtype not in (np.float16, np.int8) or values.shape[1] % LANES or not values.flags.c_contiguous:
        raise ValueError(
            f"search vectors must be rows of float16 or int8, a multiple of {LANES} wide, not {values.dtype} of width "
            f"{values.shape[1]}"
        )
    query, column = values[part.vectors.rows(part.candidate)], np.ascontiguousarray(part.column)
    if values.dtype == np.int8:
        return column, shift, values, query
    # numba has no half precision: the kernel reads the bits.
    return column, shift, values.view(np.uint16), query.astype(np.float32)


def search(kernel: Callable, length: int, first: np.ndarray, stop: np.ndarray, *arguments: Any) -> SearchResult:
    """Run a kernel of ``modules/search/cpu_kernels.py`` over all rows, in as many threads as PyTorch uses.

    Args:
        kernel: called as ``kernel(begin, end, first, stop, *arguments, out, lengths)``, for rows ``[begin, end)``.
        length: largest number of entries of a row, the width of ``out``.
        first: first place of each run.
        stop: place after the last one of each run.
        arguments: further arguments of the kernel.
    """
    out = np.empty((len(first), length), np.int64)
    lengths = np.zeros(len(first), np.int64)
    read = [_read_only(argument) for argument in (first, stop, *arguments)]

    def part(begin: int, end: int) -> None:
        kernel(begin, end, *read, out, lengths)

    each_part(part, len(first))
    return SearchResult(out[np.arange(length) >= length - lengths[:, None]], lengths)


def _read_only(argument: Any) -> Any:
    """Return a view of an array that cannot be written, and anything else as it is.

    numba compiles a kernel for each kind of argument, in seconds. Stored columns are read-only and copies of them are
    not; all of them are served by one compilation.
    """
    if isinstance(argument, np.ndarray):
        argument = argument.view()
        argument.flags.writeable = False
    return argument
