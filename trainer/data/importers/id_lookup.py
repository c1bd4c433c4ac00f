"""A number for each id of a table, looked up for whole columns of ids."""

from __future__ import annotations

import numpy as np

from trainer.data.format.id_index import IdIndex


class IdValues:
    """Collects pairs of id and value in parts, then looks values up by search among sorted ids: 16 bytes an id.

    Args:
        missing: the value of ids that were never added.
    """

    def __init__(self, missing: int) -> None:
        self._missing = missing
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._ids = self._values = np.empty(0, np.int64)

    def add(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Add pairs, ``[n] int64`` each; of several with one id the first stays."""
        self._parts.append((ids, values))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Values of ``ids [n]``, ``[n] int64``."""
        if self._parts:
            self._sort()
        if not len(self._ids):
            return np.full(len(ids), self._missing)
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._values[place], self._missing)

    def _sort(self) -> None:
        ids, values = zip((self._ids, self._values), *self._parts, strict=True)
        self._parts = []
        self._ids, first = np.unique(np.concatenate(ids), return_index=True)
        self._values = np.concatenate(values)[first]


def first_met(known: IdIndex, ids: np.ndarray) -> np.ndarray:
    """Which of ``ids [n]`` come first, in ``known`` and in ``ids``, ``[n] bool``; ``known`` has them then."""
    new = np.flatnonzero(known.find(ids) < 0)
    known.add(ids)
    met = np.zeros(len(ids), bool)
    met[new[np.unique(ids[new], return_index=True)[1]]] = True
    return met
