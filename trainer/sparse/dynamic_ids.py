"""Which ids have the rows of a dynamic table: new ones are admitted, and old ones make room.

The rows of a table are cut into buckets of :data:`BUCKET_ROWS`. An id belongs to the bucket that plain hashing would
put it into, and may have any row of it. A bucket's state is columns beside its rows, so it lies on the rank that holds
the rows, is saved like an optimizer's state, and does not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.embeddings import Table
from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.sparse import dynamic_id_kernel as kernel

BUCKET_ROWS = 64
"""Rows of a bucket. More of them come closer to one order of all ids; each look-up reads half of them on average."""

COUNTS = "counts"
"""Name of a table's counts in a checkpoint, beside its columns: :class:`IdCounts` as ``[4]`` int64."""

_POLICIES = {"recency": kernel.RECENCY, "frequency": kernel.FREQUENCY, "both": kernel.BOTH}
_SERVED = ("id", "seen", "sightings")
_CANDIDATES = ("candidate_id", "candidate_seen", "candidate_sightings")


@dataclass
class IdCounts:
    """What happened to the ids of a table; an id counts once in a step.

    Attributes:
        looked_up: ids of training steps.
        unserved: those of them that had no row and read row 0.
        admitted: times that an id got a row.
        evicted: times that an id lost it.
    """

    looked_up: int = 0
    unserved: int = 0
    admitted: int = 0
    evicted: int = 0

    @staticmethod
    def of(stored: Tensor) -> IdCounts:
        """Those in a checkpoint."""
        return IdCounts(*stored.tolist())

    def __str__(self) -> str:
        unserved = f"{100 * self.unserved / max(1, self.looked_up):.1f} % of {self.looked_up:,} look-ups"
        return f"{self.admitted:,} admitted, {self.evicted:,} evicted; {unserved} unserved"


class DynamicIds:
    """The ids of the rows ``[first_row, first_row + rows)`` of a dynamic table.

    A *sighting* of an id is a training step that looks it up, however often. From ``admit_after`` sightings on, an id
    takes a free row of its bucket, or that of an id which is worth no more than itself and was not looked up in the
    same step. What is worth least goes first, of equals the one with the smaller second number, then the first row:

    ============= ==================================== ====================
    ``evict``     worth                                among equals
    ============= ==================================== ====================
    ``recency``   step of the last sighting            sightings
    ``frequency`` sightings                            step of the last one
    ``both``      sightings / (1 + steps since then)   step of the last one
    ============= ==================================== ====================

    Ids without a row are counted as candidates, of which a bucket has as many as rows: a new one takes the place of the
    one that was seen least recently, unless that was in this step too. An id that loses its row, or its place as a
    candidate, is forgotten. Ids without a row come in ascending order, after those that have one.

    Args:
        table: whole; it has ``dynamic``.
        first_row: a multiple of :data:`BUCKET_ROWS`.
        rows: a multiple of :data:`BUCKET_ROWS`, but for the table's last ones.

    Attributes:
        first_row: as given.
        columns: name -> ``[rows]``, live: ``id`` int64, ``seen`` (step, from 1; 0 of a free row) and ``sightings``
            int32, and the same of the candidates: 32 bytes a row. Row 0 of a table stays free.
        counts: since the start.
    """

    def __init__(self, table: Table, first_row: int, rows: int) -> None:
        assert table.dynamic is not None
        self.first_row, self._last_row = first_row, first_row + rows
        self._admit_after, self._policy = table.dynamic.admit_after, _POLICIES[table.dynamic.evict]
        self._salt, self._table_rows = hash_salt(table.name), table.rows
        self.columns: dict[str, Tensor] = {}
        for names in (_SERVED, _CANDIDATES):
            types = (torch.int64, torch.int32, torch.int32)
            self.columns |= {name: torch.zeros(rows, dtype=kind) for name, kind in zip(names, types, strict=True)}
        self._served, self._candidates = self._arrays(_SERVED), self._arrays(_CANDIDATES)
        self.counts = IdCounts()

    def find(self, ids: Tensor) -> Tensor:
        """The row of each id as it is now, counted from ``first_row``; -1 where it has none. ``[n] -> [n]`` int64."""
        asked = ids.numpy()
        rows = np.empty_like(asked)
        kernel.find(asked, *self._buckets(asked), *self._served[:2], rows)
        return torch.from_numpy(rows)

    def learn(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Count the ids of a training step, admit and evict.

        Args:
            ids: ``[n]`` int64, in any order, repeated or not; all of the step whose buckets are here.
            step: its number, from 1 on, larger than in any call before.

        Returns:
            The row of each id as of this step, as :meth:`find` tells it; and ``[admitted]`` int64, the rows that have
            a new id and must start afresh.
        """
        asked = ids.numpy()
        rows = np.empty_like(asked)
        first, last = self._buckets(asked)
        seen = kernel.sight(asked, first, last, step, self._served, rows)
        missing = np.flatnonzero(rows < 0)
        new, where, which = np.unique(asked[missing], return_index=True, return_inverse=True)
        given = np.empty_like(new)
        evicted = kernel.admit(
            new,
            first[missing[where]],
            last[missing[where]],
            step,
            self._admit_after,
            self._policy,
            self._served,
            self._candidates,
            given,
        )
        rows[missing] = given[which]
        admitted = given[given >= 0]
        self.counts.looked_up += seen + len(new)
        self.counts.unserved += len(new) - len(admitted)
        self.counts.admitted += len(admitted)
        self.counts.evicted += evicted
        return torch.from_numpy(rows), torch.from_numpy(admitted)

    def _arrays(self, names: tuple[str, str, str]) -> kernel.Columns:
        """Columns as arrays over the same memory."""
        ids, seen, sightings = (self.columns[name].numpy() for name in names)
        return ids, seen, sightings

    def _buckets(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row of each id's bucket and the one after its last, counted from ``first_row``."""
        first = np.empty_like(ids)
        hash_rows(ids, self._salt, self._table_rows, first)
        first //= BUCKET_ROWS
        first *= BUCKET_ROWS
        last = np.minimum(first + BUCKET_ROWS, self._last_row) - self.first_row
        # Row 0 is that of all ids without one.
        first = np.maximum(first, 1) - self.first_row
        return first, last
