"""General search units (GSU): which entries of a long history a candidate is compared with (Moment&Cross, section 3.2).

The five searches of the paper, over the histories of a batch's users:

===========  ==================================================================================================
short        the latest short videos: :func:`latest`
long         the short videos with the largest dot product with the candidate: :func:`top`
author       the latest short videos of the candidate's author: :func:`same_author`
live_long    the live rooms with the largest dot product with the candidate: :func:`top`
mixed        the latest visits of both domains with a positive long view: :func:`latest_of_all`
===========  ==================================================================================================

A history is one run ``[first, stop)`` of flat columns, in order of time. A search gives places in these columns, oldest
first, at most ``length`` a row; fewer or none where there are no more. Of entries with the same score the later is
taken. ``modules/search/reference.py`` defines the results in plain PyTorch; they are the same here, entry by entry:

* int8: a score is the dot product in integers, which is exact.
* float16: the products are exact in float32; lane l of 16 sums those at ``l, l + 16, ...`` in order, in float32; lanes
  l and l + 8 are added, then l and l + 4, l + 2, l + 1.
* The scores of two parts are added, in float32 or in integers.

Rows are worked on by as many threads as ``torch.get_num_threads()`` says.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from modules.search import cpu_kernels
from modules.search.cpu_intrinsics import LANES


class Found(NamedTuple):
    """What a search has found for n rows.

    Attributes:
        at: places in the columns of the history, row after row, in each ascending; ``[lengths.sum()]`` int64.
        lengths: entries of each row, ``[n]`` int64.
    """

    at: np.ndarray
    lengths: np.ndarray


class SearchVectors(NamedTuple):
    """A vector for each item, or for each author: a space of dot products.

    Attributes:
        values: ``[rows, width]`` float16, all finite, or int8; ``width`` is a multiple of 16 (:func:`padded_width`).
            Row 0 is zeros and stands for ids without a vector: they score 0, and a candidate without one finds the
            latest entries.
        shift: the row of an id is the number that histories have for it plus this.
    """

    values: np.ndarray
    shift: int = 0

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows of some ids; 0 for those beyond the table."""
        rows = ids + self.shift
        return np.where((rows > 0) & (rows < len(self.values)), rows, 0)


class SearchPart(NamedTuple):
    """Dot products of one kind, between the entries of histories and n candidates.

    Attributes:
        column: of the history, int64 or int32: ids of its entries.
        candidate: ``[n]`` int64, ids to compare them with.
        vectors: of the ids.
    """

    column: np.ndarray
    candidate: np.ndarray
    vectors: SearchVectors


def padded_width(dim: int) -> int:
    """Width of a search vector of so many dimensions: the next multiple of 16. Zeros behind them change no score."""
    return -(-dim // LANES) * LANES


def latest(first: np.ndarray, stop: np.ndarray, length: int) -> Found:
    """The latest entries of each run.

    Args:
        first: ``[n]`` int64, where the runs begin.
        stop: ``[n]`` int64, where they end.
        length: most entries of a row.
    """
    lengths = np.minimum(stop - first, length)
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(stop - ends, lengths)
    return Found(at, lengths)


def same_author(
    first: np.ndarray, stop: np.ndarray, length: int, author_id: np.ndarray, candidate_author: np.ndarray
) -> Found:
    """The latest entries of each run whose author is the candidate's.

    Args:
        first: as in :func:`latest`.
        stop: likewise.
        length: likewise.
        author_id: column of the history, int64.
        candidate_author: ``[n]`` int64.
    """
    return search(cpu_kernels.same_author, length, first, stop, author_id, candidate_author)


def latest_of_all(
    first: np.ndarray, stop: np.ndarray, length: int, ordinal: np.ndarray, bits: np.ndarray, require: int = 0
) -> Found:
    """The latest entries of several runs of each user together, in order of time.

    Args:
        first: ``[n, runs]`` int64.
        stop: likewise.
        length: most entries of a row.
        ordinal: column of the history, int32: order in time of a user's entries, over all runs.
        bits: column of the history, int32: what happened in a visit.
        require: only entries with one of these bits; 0 takes all.

    Returns:
        ``Found.at`` is in order of time in each row, not ascending.
    """
    return search(cpu_kernels.latest_of_all, length, first, stop, ordinal, bits, require)


def top(first: np.ndarray, stop: np.ndarray, length: int, *parts: SearchPart) -> Found:
    """The entries of each run with the largest scores.

    Args:
        first: as in :func:`latest`.
        stop: likewise.
        length: likewise.
        parts: one, or two whose dot products are added, say of items and of their authors. The vectors of both have the
            same type.

    Raises:
        ValueError: vectors of another type or width, or more parts.
    """
    dtypes = {part.vectors.values.dtype for part in parts}
    if len(parts) not in (1, 2) or len(dtypes) > 1:
        raise ValueError(f"a search has one or two parts of one type, not {len(parts)} of {len(dtypes)}")
    kernel = cpu_kernels.top_half if np.dtype(np.float16) in dtypes else cpu_kernels.top_byte
    arguments = [argument for part in parts for argument in arguments_of(part)]
    return search(kernel, length, first, stop, len(parts), *(arguments * 2)[:8])


def arguments_of(part: SearchPart) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Column, shift, vectors and the candidates' vectors, as the kernels take them."""
    values, shift = part.vectors
    if values.dtype not in (np.float16, np.int8) or values.shape[1] % LANES or not values.flags.c_contiguous:
        raise ValueError(
            f"search vectors must be rows of float16 or int8, a multiple of {LANES} wide, not {values.dtype} of width "
            f"{values.shape[1]}"
        )
    query = values[part.vectors.rows(part.candidate)]
    if values.dtype == np.int8:
        return part.column, shift, values, query
    # numba knows no half precision: the kernel reads the bits itself.
    return part.column, shift, values.view(np.uint16), query.astype(np.float32)


def search(kernel: Callable, length: int, first: np.ndarray, stop: np.ndarray, *arguments: Any) -> Found:
    """Run a kernel of ``modules/search/cpu_kernels.py`` over all rows, in as many threads as PyTorch has.

    Args:
        kernel: called as ``kernel(begin, end, first, stop, *arguments, out, lengths)``, for rows ``[begin, end)``.
        length: most entries of a row, the width of ``out``.
        first: where the runs begin.
        stop: where they end.
        arguments: more of the kernel's.
    """
    out = np.empty((len(first), length), np.int64)
    lengths = np.zeros(len(first), np.int64)

    def part(begin: int, end: int) -> None:
        kernel(begin, end, first, stop, *arguments, out, lengths)

    each_part(part, len(first))
    return Found(out[np.arange(length) >= length - lengths[:, None]], lengths)


def each_part(work: Callable[[int, int], None], rows: int) -> None:
    """Call ``work(begin, end)`` for parts of ``[0, rows)``, side by side; it must not hold the interpreter's lock."""
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        work(0, rows)
        return
    # Histories differ in length: several parts for each thread, which takes another when it has done one.
    edges = np.linspace(0, rows, min(rows, 8 * threads) + 1).astype(int).tolist()
    parts = iter(list(itertools.pairwise(edges)))

    def work_on_parts() -> None:
        for begin, end in parts:
            work(begin, end)

    others = [_threads(os.getpid(), threads - 1).submit(work_on_parts) for _ in range(threads - 1)]
    work_on_parts()
    for other in others:
        other.result()


@cache
def _threads(process: int, number: int) -> ThreadPoolExecutor:
    """Threads that stay, as starting some takes as long as a search; a forked process has none of its parent's."""
    return ThreadPoolExecutor(number)
