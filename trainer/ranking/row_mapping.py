"""Maps rows of an old embedding table to the rows of a new one with the same meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trainer.config.features import FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.code_sets import CODE_TABLE, code_set_of
from trainer.data.features.fit import ID_TABLES, FittedFeatures
from trainer.data.features.packed_side import ACTIONS_RANGE, side_ranges


class RowMap(Protocol):
    """Pairs of rows, ascending on both sides."""

    @property
    def taken(self) -> int:
        """Return the number of pairs."""

    def of(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs with an old row in ``[first, last)``: old rows and new rows, ``[pairs]`` int64."""


@dataclass(frozen=True)
class RangeMap:
    """Ranges of rows that keep their order.

    Attributes:
        ranges: first old row, first new row and number of rows of each; ascending and disjoint.
    """

    ranges: Sequence[tuple[int, int, int]]

    @property
    def taken(self) -> int:
        """Return the number of pairs."""
        return sum(rows for _, _, rows in self.ranges)

    def of(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs with an old row in ``[first, last)``; see :class:`RowMap`."""
        old, new = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for theirs, ours, rows in self.ranges:
            part = np.arange(max(first, theirs), min(last, theirs + rows))
            old.append(part)
            new.append(part + (ours - theirs))
        return np.concatenate(old), np.concatenate(new)


@dataclass(frozen=True)
class VocabularyMap:
    """Rows of the ids that both vocabularies have, and row 0, the row of all other ids.

    Attributes:
        theirs, ours: known ids of the old and the new table, ascending; the k-th id has row ``k + 1``.
    """

    theirs: np.ndarray
    ours: np.ndarray

    @property
    def taken(self) -> int:
        """Return the number of pairs."""
        return 1 + len(np.intersect1d(self.theirs, self.ours, assume_unique=True))

    def of(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs with an old row in ``[first, last)``; see :class:`RowMap`."""
        start = max(first, 1)
        ids = self.theirs[start - 1 : max(last, 1) - 1]
        place = np.searchsorted(self.ours, ids)
        known = np.flatnonzero(place < len(self.ours))
        known = known[self.ours[place[known]] == ids[known]]
        old, new = known + start, place[known] + 1
        if first == 0 < last:
            old, new = np.concatenate([[0], old]), np.concatenate([[0], new])
        return old, new


@dataclass(frozen=True)
class ModelFeatures:
    """Feature settings and fitted features of one of the two models."""

    config: FeatureConfig
    fitted: FittedFeatures


def map_rows(table: str, old: ModelFeatures, new: ModelFeatures, old_rows: int, new_rows: int) -> RowMap:
    """Map the rows of a table that have the same meaning in both models.

    Looked-up ids are matched by id. Rows of direct ids, and of the values of a side feature, keep their place, and a
    table or feature may have grown. Hashed ids need the same number of rows, and dynamic ids are not taken over. Codes
    must be of one codebook version.

    Raises:
        UserError: rows would have another meaning, or there are fewer than before.
    """
    where = f"init_from: table {table!r}"
    if table.startswith(CODE_TABLE):
        return _map_codes(table, where, old, new, old_rows, new_rows)
    if table not in ID_TABLES:
        return _map_side(where, old, new)
    theirs, ours = getattr(old.config, table), getattr(new.config, table)
    if "dynamic" in (theirs.ids, ours.ids):
        raise UserError(
            f"{where}: dynamic ids are not taken over, since a run counts sightings from its own first step; name the "
            "tables to take in init_from.tables, without it"
        )
    if theirs.ids != ours.ids:
        raise UserError(
            f"{where}: its ids were mapped by {theirs.ids!r} and are now by {ours.ids!r}, so rows would mean other "
            f"ids; set features.{table}.ids = {theirs.ids!r}, or leave it out of init_from.tables"
        )
    if ours.ids == "lookup":
        return VocabularyMap(old.fitted.vocabularies[table], new.fitted.vocabularies[table])
    if ours.ids == "hash" and old_rows != new_rows:
        raise UserError(
            f"{where}: hashed ids have other rows in a table of another size, and it had {old_rows:,} rows where it "
            f"has {new_rows:,} now; set features.{table}.rows = {old_rows}"
        )
    if new_rows < old_rows:
        raise UserError(f"{where}: it had {old_rows:,} rows and has {new_rows:,} now; a table can only grow")
    return RangeMap([(0, 0, old_rows)])


def _map_codes(table: str, where: str, old: ModelFeatures, new: ModelFeatures, old_rows: int, new_rows: int) -> RowMap:
    theirs, ours = (side.fitted.codes[code_set_of(table)].version for side in (old, new))
    if theirs != ours:
        raise UserError(
            f"{where}: its codes were of the codebook version {theirs!a:.120} and are of {ours!a:.120} now, so rows "
            "would mean other codes; leave it out of init_from.tables"
        )
    if old_rows != new_rows:
        raise UserError(
            f"{where}: hashed prefixes have other rows in a table of another size, and it had {old_rows:,} rows where "
            f"it has {new_rows:,} now; set features.codes.{code_set_of(table)}.prefix_rows = {old_rows}"
        )
    return RangeMap([(0, 0, old_rows)])


def _map_side(where: str, old: ModelFeatures, new: ModelFeatures) -> RowMap:
    theirs, ours = (side_ranges(side.fitted.layout, side.config) for side in (old, new))
    pairs = [(0, 0, 1)]
    for name, rows in theirs.items():
        if name not in ours:
            continue
        if len(ours[name]) < len(rows):
            raise UserError(f"{where}: {name} had {len(rows)} values and has {len(ours[name])} now; it can only grow")
        if name == ACTIONS_RANGE:
            _check_actions(where, old.fitted.layout, new.fitted.layout)
        pairs.append((rows.start, ours[name].start, len(rows)))
    if sorted(start for _, start, _ in pairs) != [start for _, start, _ in pairs]:
        raise UserError(f"{where}: the dataset has its features in another order than before")
    return RangeMap(pairs)


def _check_actions(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that new behaviours only follow the old ones, since a row of the actions is a set with a bit for each."""
    before, now = old["behaviours"], new["behaviours"]
    if now[: len(before)] != before:
        raise UserError(
            f"{where}: past visits had the behaviours {', '.join(before)} and now have {', '.join(now)}; new ones must "
            "follow the old ones, or leave the table out of init_from.tables"
        )
