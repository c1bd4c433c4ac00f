"""Which entries of the users' histories go into a batch: each history's search, as of the rows' times.

Searches that depend on the candidate look at every entry of a history. What they need of an entry lies in flat columns:
its ids, or where a table is not mapped directly, the rows of the ids, worked out once where the columns do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from modules.search import search as gsu
from modules.search.search import SearchPart, SearchResult, SearchVectors
from trainer.config.features import FeatureConfig
from trainer.data.features.id_map import IdMap
from trainer.data.format.history import Histories, HistorySlice
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows

Space = Mapping[str, np.ndarray]
"""Table -> search vectors of its rows, see ``modules.search.search.SearchVectors.values``."""


class _Read(NamedTuple):
    """One history: its search, code of the domain (None for both), most entries, and bits of the behaviours."""

    search: str
    domain: int | None
    length: int
    require: int


class HistoryReader:
    """Reads the histories that a job declares.

    Args:
        spec: of the dataset.
        config: of the features.
        ids: table -> how its ids become rows.
    """

    def __init__(self, spec: DatasetSpec, config: FeatureConfig, ids: Mapping[str, IdMap]) -> None:
        self._reads = {
            name: _Read(
                history.search,
                None if history.domain == "both" else DOMAINS.index(history.domain),
                history.length,
                sum(1 << spec.behaviours.index(behaviour) for behaviour in history.require),
            )
            for name, history in config.history.items()
        }
        self._tables, self._ids = config.search.tables if config.needs_space else (), ids
        self._columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def prepare(self, histories: Histories, space: Space | None) -> None:
        """Do what worker processes would each do by themselves: compile the searches, and map columns that stay."""
        for name in self._tables:
            column = histories.column(f"{name}_id")
            if self._ids[name].mapping != "direct" and not column.flags.writeable:
                self._columns[name] = column, self._column(name, column).astype(np.int32)
        nobody = np.zeros(0, np.int64)
        self.read({f"{name}_id": nobody for name in ("user", "author", "item")}, histories, nobody, space)

    def read(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Space | None
    ) -> dict[str, HistorySlice]:
        """The entries of each history for n rows, oldest first.

        Args:
            rows: with ``user_id``, and of the candidate ``author_id`` and ``item_id``, each ``[n]`` int64.
            histories: of the dataset.
            as_of_ms: ``[n]`` int64; only what was known before is looked at.
            space: of the dot products; None if no history needs it.
        """
        slices = {}
        first = stop = np.empty((0, len(DOMAINS)), np.int64)
        if any(read.search != "latest" or read.domain is None for read in self._reads.values()):
            first, stop = histories.runs(rows["user_id"], as_of_ms)
        for name, (search, domain, length, require) in self._reads.items():
            if domain is None:
                columns = (histories.column("ordinal"), histories.column("bits"))
                found = gsu.latest_of_all(first, stop, length, *columns, require)
                live = DOMAINS.index("live")
                low, high = (np.repeat(ends[:, live], found.lengths) for ends in (first, stop))
                is_live = (found.at >= low) & (found.at < high)
                slices[name] = histories.take(*found, np.where(is_live, live, 1 - live).astype(np.uint8))
                continue
            if search == "latest":
                slices[name] = histories.latest(
                    rows["user_id"], as_of_ms, domain=domain, length=length, require=require
                )
                continue
            runs = first[:, domain].copy(), stop[:, domain].copy()
            if search == "author":
                found = gsu.same_author(*runs, length, histories.column("author_id"), rows["author_id"])
            else:
                assert space is not None, "a history searches by dot product, and there is no space"
                found = self._top(*runs, length, rows, histories, space)
            slices[name] = histories.take(*found, np.full(len(found.at), domain, np.uint8))
        return slices

    def _top(
        self, first: np.ndarray, stop: np.ndarray, length: int, rows: Rows, histories: Histories, space: Space
    ) -> SearchResult:
        columns = [self._known_column(name, histories) for name in self._tables]
        at = None
        if any(column is None for column in columns):
            # Columns that grow: what these runs need of them is copied.
            at, lengths = gsu.latest(first, stop, int((stop - first).max(initial=0)))
            columns = [self._column(name, histories.column(f"{name}_id")[at]) for name in self._tables]
            stop = np.cumsum(lengths)
            first = stop - lengths
        parts = []
        for name, column in zip(self._tables, columns, strict=True):
            vectors = SearchVectors(space[name], shift=int(self._ids[name].mapping == "direct"))
            assert column is not None
            parts.append(SearchPart(column, self._column(name, rows[f"{name}_id"]), vectors))
        found = gsu.top(first, stop, length, *parts)
        return found if at is None else SearchResult(at[found.at], found.lengths)

    def _known_column(self, name: str, histories: Histories) -> np.ndarray | None:
        """:meth:`_column` of all entries, where it is there already."""
        ids = histories.column(f"{name}_id")
        if self._ids[name].mapping == "direct":
            return ids
        known = self._columns.get(name)
        return known[1] if known is not None and known[0] is ids else None

    def _column(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Ids themselves where their row is the one after them, otherwise their rows; int64."""
        if self._ids[name].mapping == "direct":
            return ids
        rows = np.empty(len(ids), np.int64)
        self._ids[name](ids, rows)
        return rows
