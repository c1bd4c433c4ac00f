"""Lookup of an integer for each id of a table, for whole columns of ids."""

from __future__ import annotations

import numpy as np

from trainer.data.format.id_index import IdIndex


class IdLookup:
    """Map from ids to values in sorted arrays; it takes 16 bytes per id.

    Args:
        missing: value of ids that were never added.
    """

    def __init__(self, missing: int) -> None:
        self._missing = missing
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._ids = self._values = np.empty(0, np.int64)

    def add(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Add pairs of id and value, ``[n] int64`` each. The first value of an id wins."""
        self._parts.append((ids, values))

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """Return the values of ``ids [n]``, ``[n] int64``."""
        if self._parts:
            self._sort()
        if not len(self._ids):
            return np.full(len(ids), self._missing)
        position = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[position] == ids, self._values[position], self._missing)

    def _sort(self) -> None:
        ids, values = zip((self._ids, self._values), *self._parts, strict=True)
        self._parts = []
        self._ids, first = np.unique(np.concatenate(ids), return_index=True)
        self._values = np.concatenate(values)[first]


def first_occurrences(known: IdIndex, ids: np.ndarray) -> np.ndarray:
    """Return a mask ``[n] bool`` that is True at the first occurrence of an id that is not in ``known``.

    All of ``ids [n]`` are added to ``known``.
    """
    new = np.flatnonzero(known.find(ids) < 0)
    known.add(ids)
    first = np.zeros(len(ids), bool)
    first[new[np.unique(ids[new], return_index=True)[1]]] = True
    return first
