"""Maps ids to rows of a table: directly, by hash, or by a vocabulary. Row 0 is the unknown id.

Ids of dynamic tables are not mapped here: the table itself assigns their rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from trainer.config.features import IdMapping, TableConfig
from trainer.console.errors import UserError
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DatasetSpec

NO_ID = (1 << 63) - 1
"""Id in a dynamic table that stands for all unknown ids; it gets a row as any other id does."""


HASH_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors of the splitmix64 finaliser."""


class IdMap:
    """Maps arrays of ids of one table to its rows.

    Args:
        name: name of the table, for messages; it also salts the hash, so that collisions differ between tables.
        mapping: ``ids`` of the table, see ``TableConfig`` in ``trainer.config.features``.
        rows: number of rows of the table.
        vocabulary: distinct known ids in ascending order, for ``lookup`` only. The k-th of them has row ``k + 1``.

    Attributes:
        unknown: value in a batch of an unknown id: row 0, and for a dynamic table an id that no dataset has.
    """

    def __init__(self, name: str, mapping: IdMapping, rows: int, vocabulary: np.ndarray | None = None) -> None:
        self.name, self.mapping, self.rows = name, mapping, rows
        self.unknown = NO_ID if mapping == "dynamic" else 0
        self._salt = hash_salt(name)
        self._index = IdIndex()
        if vocabulary is not None:
            self._index.add(vocabulary)

    def __call__(self, ids: np.ndarray, out: np.ndarray) -> int:
        """Write the row of each id, in ``[0, rows)``; for a dynamic table, write the id itself.

        New users and items are the normal case: a direct id beyond the table has row 0, like any unknown id.

        Args:
            ids: ``[n]`` int64.
            out: ``[n]`` int64, contiguous; written.

        Returns:
            The number of direct ids beyond the table.

        Raises:
            UserError: the mapping is ``direct``, and an id is negative.
        """
        if not len(ids):
            return 0
        if self.mapping == "direct":
            low, high = int(ids.min()), int(ids.max())
            if low < 0:
                raise UserError(f"{self.name} id {low} is negative; ids are 0 or more")
            np.add(ids, 1, out=out)
            if high + 1 >= self.rows:
                beyond = ids >= self.rows - 1
                out[beyond] = 0
                return int(beyond.sum())
        elif self.mapping == "hash":
            hash_rows(ids, self._salt, self.rows, out)
        elif self.mapping == "dynamic":
            out[:] = ids
        else:
            np.add(self._index.find(ids), 1, out=out)
        return 0


def beyond_message(beyond: Mapping[str, int]) -> str:
    """Return a line about direct ids beyond their tables.

    Args:
        beyond: number of such ids, of candidates by table and of ``histories``.
    """
    counts = ", ".join(f"{count:,} of {name}" for name, count in beyond.items() if count)
    return f"unknown ids: {counts} (direct ids beyond the rows of their tables; they read row 0)"


def hash_salt(table: str) -> np.uint64:
    """Return the salt that a table's hash mixes into ids, so that collisions differ between tables."""
    return np.uint64(zlib.crc32(table.encode()) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)


def hash_rows(ids: np.ndarray, salt: np.uint64, rows: int, out: np.ndarray) -> None:
    """Write the row of each id: the splitmix64 finaliser of the salted id, scaled to ``[1, rows)`` (Lemire, 2019).

    Args:
        ids: ``[n]`` int64.
        salt: salt of the table.
        rows: number of rows of the table, including row 0.
        out: ``[n]`` int64, contiguous; written.
    """
    mixed = out.view(np.uint64)
    np.bitwise_xor(ids.view(np.uint64), salt, out=mixed)
    scratch = np.empty_like(mixed)
    # All steps work in place on `out`: this runs over every id of every batch.
    for shift, factor in HASH_STEPS:
        np.right_shift(mixed, np.uint64(shift), out=scratch)
        mixed ^= scratch
        mixed *= np.uint64(factor)
    # The last step of the finaliser, mixed ^ mixed >> 31, is left out: it does not change the upper 31 bits.
    # A multiplication and a shift scale 32 bits to the rows, which is faster than a remainder.
    mixed >>= np.uint64(32)
    mixed *= np.uint64(rows - 1)
    mixed >>= np.uint64(32)
    mixed += np.uint64(1)


def table_rows(name: str, config: TableConfig, spec: DatasetSpec, known_ids: int) -> int:
    """Return the number of rows of a table, including row 0.

    Args:
        name: ``user``, ``author`` or ``item``.
        config: settings of the table.
        spec: description of the training data.
        known_ids: size of the vocabulary, for ``lookup``.

    Raises:
        UserError: the mapping is ``direct`` and the ids of the dataset do not fit into the table.
    """
    if config.ids == "lookup":
        return known_ids + 1
    if config.ids in ("hash", "dynamic"):
        assert config.rows is not None
        return config.rows
    needed = spec.ids[name].max + 2
    if config.rows is not None and config.rows < needed:
        raise UserError(
            f"features.{name}.rows = {config.rows}: the largest {name} id of this dataset is {spec.ids[name].max}, so "
            f"direct ids need {needed} rows; give the table as many, or map its ids by 'hash' or 'lookup'"
        )
    return config.rows or needed
