"""Lines of a log that are there twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.format.sorting import first_of_each
from trainer.data.format.validation import Columns

_MIX = np.uint64(0x9E3779B97F4A7C15)
VISIT_KEY = ("user_id", "item_id", "request_ms")
"""Columns of a visit; two visits with the same values are one visit in a log that repeats lines."""


@dataclass(frozen=True)
class DuplicateRule:
    """Rule for visits that were added twice. Of those that belong together, the one that was added first is kept.

    Attributes:
        drop: ``visits`` drops visits with the ``key`` of an earlier one, ``lines`` only those with the values of an
            earlier one in all columns; ``none`` keeps and counts them.
        key: columns, ``user_id`` among them, in which all visits that belong together agree.
        visit_ids: True if the ids of the visits come from the log, so that repetitions have the same id.
    """

    drop: Literal["visits", "lines", "none"] = "visits"
    key: tuple[str, ...] = VISIT_KEY
    visit_ids: bool = False

    def apply(self, visits: Columns) -> tuple[Columns, int]:
        """Return the visits that are kept, and the number of those that repeat an earlier one in all columns."""
        compared = [name for name in visits if name != "visit_id" or self.visit_ids]
        first, exact = find_duplicates(visits, self.key, compared)
        if self.drop == "none":
            return visits, len(exact)
        rows = len(visits["user_id"])
        kept = first if self.drop == "visits" else np.setdiff1d(np.arange(rows), exact, assume_unique=True)
        if len(kept) == rows:
            return visits, 0
        return {name: column[kept] for name, column in visits.items()}, len(exact)


def find_duplicates(columns: Columns, key: Sequence[str], compared: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Find lines that are there twice.

    Args:
        columns: columns of the lines, ``[n]`` each, without NaN.
        key: some of the columns ``compared``; the better they tell lines apart, the less is compared.
        compared: columns in which a line that is there twice agrees with an earlier one.

    Returns:
        Positions of the first line with each key, and positions of the lines that repeat an earlier one; both in
        increasing order.
    """
    keys = [columns[name] for name in key]
    # One hash is sorted instead of all keys. Only lines that share one can be equal, and they are few in most logs.
    hashes = hash_lines(keys)
    ordered = np.sort(hashes)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(shared):
        return np.arange(len(hashes)), np.empty(0, np.int64)
    rows = np.flatnonzero(np.isin(hashes, shared))
    first = first_of_each([column[rows] for column in keys])
    distinct = first_of_each([columns[name][rows] for name in compared])
    return np.delete(np.arange(len(hashes)), np.delete(rows, first)), np.delete(rows, distinct)


def hash_lines(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Return a hash of the values of n lines, ``[n] int64``."""
    mixed = np.zeros(1, np.uint64)
    for column in columns:
        wide = column.astype(np.float64 if column.dtype.kind == "f" else np.int64)
        mixed = (mixed ^ wide.view(np.uint64)) * _MIX
        mixed ^= mixed >> np.uint64(29)
    return mixed.view(np.int64)
