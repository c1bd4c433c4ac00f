"""Joins the side and dense features of users, authors and items to rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format import validation
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DatasetSpec, DenseFeature, SideFeature

TABLE_OF = {"user": "users", "author": "authors", "item": "items"}
"""Owner of a feature -> name of the dataset's table that has it."""


class FeatureJoin:
    """Looks up the features of users, authors and items. If an id is not in its table, all its features are 0.

    Args:
        spec: description of the dataset, which lists the features and their tables.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._tables = {owner: _FeatureTable(spec, owner) for owner in TABLE_OF}

    def add(self, owner: str, table: pa.Table) -> np.ndarray:
        """Add lines to the table of ``owner`` (``user``, ``author`` or ``item``), and return their ids.

        Raises:
            UserError: the column of a feature is missing, a value is out of range, or an id occurs twice.
        """
        return self._tables[owner].add(table)

    def check(self) -> None:
        """Check that every table that a feature needs was added, and prepare the lookups; then nothing can be added.

        Raises:
            UserError: a table is missing.
        """
        for owner, table in self._tables.items():
            if table.names and not table.was_added:
                raise UserError(
                    f"table {TABLE_OF[owner]!r} was not given; the features {', '.join(table.names)} are its columns"
                )
        for table in self._tables.values():
            table.complete()

    def features(self, columns: validation.Columns) -> tuple[np.ndarray, np.ndarray]:
        """Return the side ``[n, side] int32`` and dense ``[n, dense] float32`` features of rows or visits.

        Args:
            columns: ``user_id``, ``author_id``, ``item_id`` and one column for each ``context`` feature.
        """
        n = len(columns["user_id"])
        tables = {owner: table for owner, table in self._tables.items() if table.names}
        line = {owner: table.index.find(columns[f"{owner}_id"]) + 1 for owner, table in tables.items()}
        side = np.empty((n, len(self._spec.side)), np.int32)
        dense = np.empty((n, len(self._spec.dense)), np.float32)
        _fill(side, self._spec.side, {owner: table.side[line[owner]] for owner, table in tables.items()}, columns)
        _fill(dense, self._spec.dense, {owner: table.dense[line[owner]] for owner, table in tables.items()}, columns)
        return side, dense

    def tags(self, item_id: np.ndarray) -> np.ndarray:
        """Return the feature ``spec.tag`` of each item, ``[n] int32``; 0 (unknown) if there is none."""
        if not self._spec.tag:
            return np.zeros(len(item_id), np.int32)
        items = self._tables["item"]
        return items.side[items.index.find(item_id) + 1, items.names.index(self._spec.tag)]


class _FeatureTable:
    """Features of one kind of id, by line. Line 0 holds the zeros of all ids that were not added."""

    def __init__(self, spec: DatasetSpec, owner: str) -> None:
        self._owner = owner
        self._side = tuple(side for side in spec.side if side.of == owner)
        self._dense = tuple(dense.name for dense in spec.dense if dense.of == owner)
        self.names = [*(side.name for side in self._side), *self._dense]
        self.was_added = False
        self.index = IdIndex()
        self._blocks = [(np.zeros((1, len(self._side)), np.int32), np.zeros((1, len(self._dense)), np.float32))]

    def add(self, table: pa.Table) -> np.ndarray:
        """Add lines, and return their ids; see :meth:`FeatureJoin.add`."""
        what, id_name = TABLE_OF[self._owner], f"{self._owner}_id"
        side_names = [side.name for side in self._side]
        schema = pa.schema(
            [
                (id_name, pa.int64()),
                *((name, pa.int32()) for name in side_names),
                *((name, pa.float32()) for name in self._dense),
            ]
        )
        # Other columns of the table are allowed and not checked.
        for name in schema.names:
            if name not in table.column_names:
                raise UserError(f"{what}: column {name!r} is missing")
        columns = validation.columns_of(table.select(schema.names), schema, what)
        ids = columns[id_name]
        validation.check_ids(columns, (id_name,), what)
        validation.check_side(columns, self._side, what)
        validation.check_finite(columns, self._dense, what)

        ordered = np.sort(ids)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        known = ids[self.index.find(ids) >= 0]
        for repeated in (*twice[:1], *known[:1]):
            raise UserError(f"{what}: {id_name} {repeated} comes twice; each id must have one line")
        # The index numbers new ids in increasing order; the block must have the same order.
        order = np.argsort(self.index.add(ids))
        self.was_added = True
        self._blocks.append(
            (_matrix(columns, side_names, np.int32)[order], _matrix(columns, list(self._dense), np.float32)[order])
        )
        return ids

    def complete(self) -> None:
        """Join the features of all blocks into one array each."""
        side, dense = zip(*self._blocks, strict=True)
        self.side, self.dense = np.concatenate(side), np.concatenate(dense)


def _fill(
    out: np.ndarray,
    features: Sequence[SideFeature | DenseFeature],
    joined: dict[str, np.ndarray],
    columns: validation.Columns,
) -> None:
    """Write each feature into its column of ``out``: joined ones by owner, ``context`` ones from ``columns``."""
    for owner, values in joined.items():
        out[:, [place for place, feature in enumerate(features) if feature.of == owner]] = values
    for place, feature in enumerate(features):
        if feature.of == "context":
            out[:, place] = columns[feature.name]


def _matrix(columns: validation.Columns, names: list[str], dtype: type) -> np.ndarray:
    """Return some columns side by side, ``[n, len(names)]``."""
    matrix: np.ndarray = np.empty((len(next(iter(columns.values()))), len(names)), dtype)
    for place, name in enumerate(names):
        matrix[:, place] = columns[name]
    return matrix
