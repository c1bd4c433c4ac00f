"""Selects the entries of the users' histories that go into a batch: runs each history's search as of the rows' times.

Searches that depend on the candidate look at every entry of a history. They read flat columns: the ids of the entries
or, if a table is not mapped directly, the rows of these ids, which are computed once if the columns do not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from modules.search import search as gsu
from modules.search.search import SearchPart, SearchResult, SearchVectors
from trainer.config.features import FeatureConfig
from trainer.data.features.device_places import DevicePlaces, DeviceRun
from trainer.data.features.growing_places import GrowingPlaces
from trainer.data.features.history_reads import history_reads
from trainer.data.features.id_map import IdMap
from trainer.data.format.history import Histories, HistorySlice
from trainer.data.format.schema import DOMAINS, DatasetSpec, Rows

Space = Mapping[str, np.ndarray]
"""Table -> search vectors of its rows, see ``modules.search.search.SearchVectors.values``."""

Searched = Space | DevicePlaces | GrowingPlaces
"""Input of searches: vectors for those by dot product, or the places of the entries on a device that makes searches."""


class HistoryReader:
    """Reads the histories that a job declares.

    Args:
        spec: description of the dataset.
        config: the ``[features]`` section of the job.
        ids: table -> map from its ids to rows.

    Attributes:
        reads: name of each history -> its settings.
    """

    def __init__(self, spec: DatasetSpec, config: FeatureConfig, ids: Mapping[str, IdMap]) -> None:
        self.reads = history_reads(spec, config)
        self._tables, self._ids = config.search.tables if config.needs_space else (), ids
        self._columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def prepare(self, histories: Histories, space: Searched | None) -> None:
        """Compile the searches and map columns that do not change, so that worker processes need not do it each."""
        for name in () if isinstance(space, DevicePlaces) else self._tables:
            column = histories.column(f"{name}_id")
            if self._ids[name].mapping != "direct" and not column.flags.writeable:
                self._columns[name] = column, self._column(name, column).astype(np.int32)
        # A read of no rows compiles the kernels.
        nobody = np.zeros(0, np.int64)
        self.read({f"{name}_id": nobody for name in ("user", "author", "item")}, histories, nobody, space)

    def read(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None
    ) -> dict[str, HistorySlice]:
        """Return the entries of each history for n rows, oldest first; none of those that are left to a device.

        Args:
            rows: ``user_id``, and ``author_id`` and ``item_id`` of the candidate, each ``[n]`` int64.
            histories: histories of the dataset.
            as_of_ms: ``[n]`` int64; only visits known before this time are read.
            space: what is searched by dot product; None if no history is.
        """
        return self.read_or_leave(rows, histories, as_of_ms, space)[0]

    def read_or_leave(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None
    ) -> tuple[dict[str, HistorySlice], dict[str, DeviceRun]]:
        """Return what :meth:`read` returns, and the runs of each history that is left to a device."""
        if isinstance(space, DevicePlaces):
            return {}, self._leave(rows, histories, as_of_ms, space)
        slices: dict[str, HistorySlice] = {}
        left: dict[str, DeviceRun] = {}
        # All histories that need the runs share one lookup of them.
        first = stop = np.empty((0, len(DOMAINS)), np.int64)
        if any(read.search != "latest" or read.domain is None for read in self.reads.values()):
            first, stop = histories.runs(rows["user_id"], as_of_ms)
        for name, (search, domain, length, require) in self.reads.items():
            if domain is None:
                columns = (histories.column("ordinal"), histories.column("bits"))
                found = gsu.latest_of_all(first, stop, length, *columns, require)
                live = DOMAINS.index("live")
                low, high = (np.repeat(ends[:, live], found.lengths) for ends in (first, stop))
                # The search mixes the runs of both domains; the position of an entry tells its domain.
                is_live = (found.at >= low) & (found.at < high)
                slices[name] = histories.take(*found, np.where(is_live, live, 1 - live).astype(np.uint8))
                continue
            if search == "latest":
                slices[name] = histories.latest(
                    rows["user_id"], as_of_ms, domain=domain, length=length, require=require
                )
                continue
            runs = first[:, domain].copy(), stop[:, domain].copy()
            if search == "top" and isinstance(space, GrowingPlaces):
                left[name] = space.left(*runs, length)
                continue
            if search == "author":
                found = gsu.same_author(*runs, length, histories.column("author_id"), rows["author_id"])
            else:
                assert isinstance(space, Mapping), "a history searches by dot product, and there is no space"
                found = self._top(*runs, length, rows, histories, space)
            slices[name] = histories.take(*found, np.full(len(found.at), domain, np.uint8))
        return slices, left

    def _leave(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, places: DevicePlaces
    ) -> dict[str, DeviceRun]:
        """Return the runs of each history on the device that reads them."""
        first, stop = histories.runs(rows["user_id"], as_of_ms)
        left = {}
        for name, read in self.reads.items():
            runs = (first, stop) if read.domain is None else (first[:, read.domain], stop[:, read.domain])
            left[name] = places.left(rows, *runs, read)
        return left

    def _top(
        self, first: np.ndarray, stop: np.ndarray, length: int, rows: Rows, histories: Histories, space: Space
    ) -> SearchResult:
        """Search the runs ``[first, stop)`` for the entries with the largest dot product with the candidate."""
        columns = [self._known_column(name, histories) for name in self._tables]
        at = None
        if any(column is None for column in columns):
            # Columns of growing histories are not mapped ahead: copy the entries of these runs and map them now.
            at, lengths = gsu.latest(first, stop, int((stop - first).max(initial=0)))
            columns = [self._column(name, histories.column(f"{name}_id")[at]) for name in self._tables]
            stop = np.cumsum(lengths)
            first = stop - lengths
        parts = []
        for name, column in zip(self._tables, columns, strict=True):
            # Direct ids are not mapped: the kernel adds 1, which skips row 0.
            vectors = SearchVectors(space[name], shift=int(self._ids[name].mapping == "direct"))
            assert column is not None
            parts.append(SearchPart(column, self._column(name, rows[f"{name}_id"]), vectors))
        found = gsu.top(first, stop, length, *parts)
        return found if at is None else SearchResult(at[found.at], found.lengths)

    def _known_column(self, name: str, histories: Histories) -> np.ndarray | None:
        """Return :meth:`_column` of all entries if it needs no mapping or was mapped by :meth:`prepare`, else None."""
        ids = histories.column(f"{name}_id")
        if self._ids[name].mapping == "direct":
            return ids
        # Columns of growing histories are replaced when they grow; a mapped copy is valid only for the same array.
        known = self._columns.get(name)
        return known[1] if known is not None and known[0] is ids else None

    def _column(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Return the ids themselves if the table is mapped directly (row = id + 1), otherwise their rows; int64."""
        if self._ids[name].mapping == "direct":
            return ids
        rows = np.empty(len(ids), np.int64)
        self._ids[name](ids, rows)
        return rows
