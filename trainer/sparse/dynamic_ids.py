"""Assignment of ids to the rows of a dynamic table: new ids are admitted and old ones are evicted.

The rows of a table are divided into buckets of :data:`BUCKET_ROWS`. An id belongs to the bucket that plain hashing
would put it into, and may have any row of this bucket. The state of a bucket is stored as columns beside its rows: it
is on the rank that holds the rows, is saved like an optimizer's state, and does not depend on the number of ranks.
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
"""Rows of a bucket.

Larger buckets come closer to ranking all ids of the table together, but a lookup reads half a bucket on average.
"""

ID_BYTES = 32
"""Bytes of all columns for each row."""

COUNTS = "counts"
"""Name of a table's counts in a checkpoint, beside its columns: the fields of :class:`IdCounts` as ``[4]`` int64."""

_POLICIES = {"recency": kernel.RECENCY, "frequency": kernel.FREQUENCY, "both": kernel.BOTH}
SERVED = ("id", "seen", "sightings")
"""Names of the columns of the ids that have a row."""

CANDIDATES = ("candidate_id", "candidate_seen", "candidate_sightings")
"""Names of the columns of the ids that are only counted."""


@dataclass
class IdCounts:
    """Counts of what happened to the ids of a table; an id counts once in a step.

    Attributes:
        looked_up: ids that training steps looked up.
        unserved: looked-up ids that had no row and read row 0.
        admitted: number of times that an id got a row.
        evicted: number of times that an id lost its row.
    """

    looked_up: int = 0
    unserved: int = 0
    admitted: int = 0
    evicted: int = 0

    @staticmethod
    def of(stored: Tensor) -> IdCounts:
        """Return the counts that a checkpoint stores."""
        return IdCounts(*stored.tolist())

    def __str__(self) -> str:
        """Return the counts as text for the log and the report."""
        unserved = f"{100 * self.unserved / max(1, self.looked_up):.1f} % of {self.looked_up:,} look-ups"
        return f"{self.admitted:,} admitted, {self.evicted:,} evicted; {unserved} unserved"


def make_columns(rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return the columns of rows without ids; see :class:`DynamicIds`."""
    types = (torch.int64, torch.int32, torch.int32)
    return {
        name: torch.zeros(rows, dtype=kind, device=device)
        for names in (SERVED, CANDIDATES)
        for name, kind in zip(names, types, strict=True)
    }


class DynamicIds:
    """Ids of the rows ``[first_row, first_row + rows)`` of a dynamic table, on a CPU.

    :class:`trainer.sparse.device_ids.DeviceIds` is the same map on a GPU.

    A *sighting* of an id is a training step that looks it up, however often. From ``admit_after`` sightings on, an id
    takes a free row of its bucket, or else the row of an id that is worth no more than itself and was not looked up in
    the same step. The id that is worth least is evicted; among equals the one with the smaller value in the last
    column, and among those the one in the first row:

    ============= ==================================== ====================
    ``evict``     worth                                among equals
    ============= ==================================== ====================
    ``recency``   step of the last sighting            sightings
    ``frequency`` sightings                            step of the last one
    ``both``      sightings / (1 + steps since then)   step of the last one
    ============= ==================================== ====================

    Ids without a row are counted as candidates. A bucket has as many candidates as rows: a new one replaces the
    candidate that was seen least recently, unless that one was seen in this step too. An id that loses its row, or its
    place as a candidate, is forgotten. Within a step, ids that have a row are processed first, then those without, in
    ascending order.

    Args:
        table: declaration of the whole table, with ``dynamic`` set.
        first_row: first row of this rank's shard, a multiple of :data:`BUCKET_ROWS`.
        rows: rows of the shard, a multiple of :data:`BUCKET_ROWS` unless they are the table's last ones.

    Attributes:
        first_row: as given.
        columns: name -> ``[rows]``, live memory: ``id`` int64, ``seen`` (a step, from 1 on; 0 for a free row) and
            ``sightings`` int32, and the same for the candidates; 32 bytes for each row. Row 0 of a table stays free.
        counts: counts of this rank since the job started or loaded a checkpoint.
    """

    def __init__(self, table: Table, first_row: int, rows: int) -> None:
        assert table.dynamic is not None
        self.first_row, self._last_row = first_row, first_row + rows
        self._admit_after, self._policy = table.dynamic.admit_after, _POLICIES[table.dynamic.evict]
        self._salt, self._table_rows = hash_salt(table.name), table.rows
        self.columns = make_columns(rows, torch.device("cpu"))
        self._served, self._candidates = self._arrays(SERVED), self._arrays(CANDIDATES)
        self.counts = IdCounts()

    def find(self, ids: Tensor) -> Tensor:
        """Return the current row of each id, counted from ``first_row``; -1 if it has none. ``[n] -> [n]`` int64."""
        values = ids.numpy()
        rows = np.empty_like(values)
        kernel.find(values, *self._buckets(values), *self._served[:2], rows)
        return torch.from_numpy(rows)

    def learn(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Count the ids of a training step, admit new ids and evict old ones.

        Args:
            ids: ``[n]`` int64, all ids of the step whose buckets are in this shard; in any order, with repetitions.
            step: number of the step, from 1 on; larger than in every call before.

        Returns:
            The row of each id from this step on, in the form of :meth:`find`; and ``[admitted]`` int64, rows that have
            a new id and must be initialised again.
        """
        values = ids.numpy()
        rows = np.empty_like(values)
        first, last = self._buckets(values)
        seen = kernel.sight(values, first, last, step, self._served, rows)
        missing = np.flatnonzero(rows < 0)
        # Sorting makes the result independent of the order in which the ranks' ids arrive.
        new, occurrence, inverse = np.unique(values[missing], return_index=True, return_inverse=True)
        new_rows = np.empty_like(new)
        evicted = kernel.admit(
            new,
            first[missing[occurrence]],
            last[missing[occurrence]],
            step,
            self._admit_after,
            self._policy,
            self._served,
            self._candidates,
            new_rows,
        )
        rows[missing] = new_rows[inverse]
        admitted = new_rows[new_rows >= 0]
        self.counts.looked_up += seen + len(new)
        self.counts.unserved += len(new) - len(admitted)
        self.counts.admitted += len(admitted)
        self.counts.evicted += evicted
        return torch.from_numpy(rows), torch.from_numpy(admitted)

    def _arrays(self, names: tuple[str, str, str]) -> kernel.Columns:
        """Return columns as NumPy arrays over the same memory."""
        ids, seen, sightings = (self.columns[name].numpy() for name in names)
        return ids, seen, sightings

    def _buckets(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row of each id's bucket and the row after its last, counted from ``first_row``."""
        first = np.empty_like(ids)
        hash_rows(ids, self._salt, self._table_rows, first)
        first //= BUCKET_ROWS
        first *= BUCKET_ROWS
        last = np.minimum(first + BUCKET_ROWS, self._last_row) - self.first_row
        # Row 0 serves all ids that have no row of their own, so no id may take it.
        first = np.maximum(first, 1) - self.first_row
        return first, last
