"""Pre-trained vectors of a batch: looked up in memory-mapped tables, each distinct vector once.

The tables are those of ``[features.content.NAME]``. They are never trained. The network projects the vectors
(``modules/content.py``); an id without a vector reads a learnt one, and is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modules.embeddings import Lookup
from trainer.config.features import ContentConfig, FeatureConfig
from trainer.data.features.author_means import AuthorMeans
from trainer.data.features.content_tables import TableFacts, check_tables, open_segments, open_tables
from trainer.data.features.missing_inputs import MissingCounts
from trainer.data.features.packed_batch import ContentLayout
from trainer.data.features.segment_index import NO_SEGMENT, SegmentChanges, SegmentIndex
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.format.segments import DatasetSegments
from trainer.runtime.unique import find_unique

_LIVE = DOMAINS.index("live")


@dataclass(frozen=True)
class FoundVectors:
    """Vectors of one table for a batch.

    Attributes:
        keys: distinct vectors, ``[distinct]`` int64, in the terms of their reader.
        places: for the candidates, and then for the entries of each history: index of each vector in ``keys``,
            ``[ids]`` int64; -1 for an id without a vector.
        never: number of entries that can have no vector, whatever the table has: videos have no segments.
    """

    keys: np.ndarray
    places: list[np.ndarray]
    never: int = 0

    @property
    def candidate_keys(self) -> np.ndarray:
        """Key of each candidate's vector, ``[rows]`` int64; -1 without one."""
        return np.append(self.keys, -1)[self.places[0]]

    @property
    def missing(self) -> MissingCounts:
        """Numbers of ids without a vector, of those that can have one."""
        candidates, *entries = self.places
        return MissingCounts(
            int((candidates < 0).sum()),
            len(candidates),
            sum(int((places < 0).sum()) for places in entries) - self.never,
            sum(len(places) for places in entries) - self.never,
        )


class OwnerVectors:
    """Vectors of items or of authors, by the id of their owner.

    Args:
        table: vectors by id.
        owner: ``item`` or ``author``.
    """

    def __init__(self, table: ContentVectors, owner: str) -> None:
        self._table, self._owner = table, owner

    def keys(self, rows: Rows, visits: Sequence[HistorySlice], as_of_ms: np.ndarray) -> list[np.ndarray]:
        """Return the owner of each candidate, and of the entries of each history, ``[ids]`` int64."""
        return [rows[f"{self._owner}_id"], *(getattr(entries, f"{self._owner}_id") for entries in visits)]

    @property
    def vectors(self) -> np.ndarray:
        """All vectors of the table, ``[rows, width]``."""
        return self._table.vectors

    def entry_rows(self, visits: HistorySlice) -> np.ndarray:
        """Return the row of each entry's vector in the table, ``[entries]`` int64; -1 without a vector."""
        return self._table.lookup(getattr(visits, f"{self._owner}_id"))

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each distinct key in the table, ``[distinct]`` int64; -1 without a vector."""
        return self._table.lookup(keys)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the vectors of rows of the table, ``[distinct, width]``."""
        # Without a mode that forgives wrong rows, NumPy would first write into a buffer of its own.
        np.take(self._table.vectors, rows, axis=0, out=out, mode="clip")


class SegmentReadings:
    """Vectors of the segments of live rooms, as of the time of each row.

    A candidate reads the latest segment of its author, or the mean of all of them; an entry of a history reads the
    segment that was on air while the user watched. Only segments that were known at the time of the row count, and only
    those that have a vector.

    Args:
        table: vectors by the id of a segment.
        segments: segments of the dataset, at least those of the table.
        content: section of the table.
    """

    def __init__(self, table: ContentVectors, segments: DatasetSegments, content: ContentConfig) -> None:
        self._table, self._content = table, content
        at = segments.rows_of(table.ids)
        author_id = segments.author_id[at]
        # The rows of the table are the places of the index.
        self._index = SegmentIndex(author_id, segments.item_id[at], segments.start_ms[at], segments.known_ms[at])
        self._means = None
        if content.reading == "mean":
            self._means = AuthorMeans(table.vectors, self._index.order, author_id[self._index.order])

    def keys(self, rows: Rows, visits: Sequence[HistorySlice], as_of_ms: np.ndarray) -> list[np.ndarray]:
        """Return the row of each vector in the table, ``[ids]`` int64; -1 without one.

        Means have numbers beyond the table: that of the last segment of the mean in the order of the index, behind all
        rows.
        """
        if self._means is None:
            candidates = self._index.latest(rows["author_id"], as_of_ms)
        else:
            first, stop = self._index.span(rows["author_id"], as_of_ms)
            candidates = np.where(stop > first, len(self._table) + stop - 1, NO_SEGMENT)
        choice = self._content.on_air
        watched = [self._index.watched(past, np.repeat(as_of_ms, past.lengths), choice) for past in visits]
        return [candidates, *watched]

    @property
    def vectors(self) -> np.ndarray:
        """All vectors of the table, ``[rows, width]``."""
        return self._table.vectors

    def entry_changes(self, visits: HistorySlice, from_ms: np.ndarray) -> SegmentChanges:
        """Return the rows of the entries' vectors in the table for every time; see ``SegmentIndex.changes``."""
        return self._index.changes(visits, from_ms, self._content.on_air)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Return the keys themselves, which are rows of the table or means."""
        return keys

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the vectors of some keys, ``[distinct, width]``."""
        if self._means is None:
            np.take(self._table.vectors, rows, axis=0, out=out, mode="clip")
            return
        mean = rows >= len(self._table)
        out[~mean] = self._table.vectors[rows[~mean]]
        means = np.empty((int(mean.sum()), out.shape[1]), np.float32)
        self._means.read(rows[mean] - len(self._table), means)
        out[mean] = means

    def prepare(self) -> None:
        """Compile the loops of means."""
        if self._means is not None:
            self._means.prepare()


class ContentReader:
    """Reads the pre-trained vectors of a batch.

    Args:
        config: the sections ``features.content``, by name.
        tables: opened table of each of them.
        segments: segments of the dataset for each table of segments.
    """

    def __init__(
        self,
        config: Mapping[str, ContentConfig],
        tables: Mapping[str, ContentVectors],
        segments: Mapping[str, DatasetSegments],
    ) -> None:
        self._with_histories = [content.histories for content in config.values()]
        self._names = list(config)
        self._readers: list[OwnerVectors | SegmentReadings] = [
            SegmentReadings(tables[name], segments[name], content)
            if content.of == "segment"
            else OwnerVectors(tables[name], content.of)
            for name, content in config.items()
        ]

    def prepare(self, nobody: Rows, visits: Mapping[str, HistorySlice]) -> None:
        """Compile the loops, so that worker processes need not do it each.

        Args:
            nobody: no rows.
            visits: entries of each history of no rows.
        """
        self.find(nobody, visits, np.zeros(0, np.int64))
        for reader in self._readers:
            if isinstance(reader, SegmentReadings):
                reader.prepare()

    def of_histories(self) -> dict[str, OwnerVectors | SegmentReadings]:
        """Return the reader of each table that entries of histories have vectors of."""
        readers = zip(self._names, self._readers, self._with_histories, strict=True)
        return {name: reader for name, reader, with_histories in readers if with_histories}

    def find(self, rows: Rows, visits: Mapping[str, HistorySlice], as_of_ms: np.ndarray) -> list[FoundVectors]:
        """Find the distinct vectors of each table.

        Args:
            rows: n canonical rows.
            visits: entries of each history.
            as_of_ms: ``[n]`` int64; nothing that became known later is read.
        """
        found = []
        for reader, with_histories in zip(self._readers, self._with_histories, strict=True):
            entries = list(visits.values()) if with_histories else []
            of_table = self._distinct(reader, reader.keys(rows, entries, as_of_ms))
            if isinstance(reader, SegmentReadings):
                videos = sum(int((of_history.domain != _LIVE).sum()) for of_history in entries)
                of_table = replace(of_table, never=videos)
            found.append(of_table)
        return found

    def read(self, found: Sequence[FoundVectors], out: Iterable[np.ndarray]) -> None:
        """Write the vectors that :meth:`find` found: for each table ``[distinct, width]``, of its type."""
        for reader, of_table, target in zip(self._readers, found, out, strict=True):
            reader.read(of_table.keys, target)

    @staticmethod
    def _distinct(reader: OwnerVectors | SegmentReadings, keys: list[np.ndarray]) -> FoundVectors:
        """Return the distinct vectors of some keys."""
        unique, places = find_unique(np.concatenate(keys))
        rows = reader.rows(unique)
        present = rows >= 0
        # The last element is that of -1.
        renumbered = np.where(present, np.cumsum(present) - 1, -1)
        places = renumbered[places] if len(unique) else places.astype(np.int64)
        cuts = np.cumsum([len(of_lookup) for of_lookup in keys])[:-1]
        return FoundVectors(rows[present], np.split(places, cuts))


def content_layouts(config: FeatureConfig, facts: Mapping[str, TableFacts]) -> tuple[ContentLayout, ...]:
    """Return the layout of each table's vectors in a batch.

    Args:
        config: the ``[features]`` section of the job.
        facts: facts of each table.
    """
    return tuple(
        ContentLayout(
            name,
            facts[name].width,
            content.dim,
            "float32" if content.reading == "mean" else facts[name].dtype,
            {f"{history}_{name}": f"{history}_item" for history in config.history} if content.histories else {},
        )
        for name, content in config.content.items()
    )


def content_lookups(layouts: Sequence[ContentLayout]) -> tuple[Lookup, ...]:
    """Return the lookups of the projected vectors: of the candidate, then of the entries of each history."""
    return tuple(
        lookup
        for table in layouts
        for lookup in (Lookup(table.name, table.name, 1), *(Lookup(name, table.name, None) for name in table.entries))
    )


def open_reader(
    config: FeatureConfig,
    dataset: str,
    fitted: Mapping[str, TableFacts],
    tables: Mapping[str, ContentVectors] | None = None,
    segments: Mapping[str, DatasetSegments] | None = None,
    *,
    accepted: Collection[str] = (),
) -> ContentReader | None:
    """Open the reader of a model's pre-trained vectors; None if it has none.

    Args:
        config: the ``[features]`` section of the model's job.
        dataset: path of the dataset that is read.
        fitted: facts of the tables at the start of training.
        tables: the tables, if they are open already.
        segments: segments of the dataset for each table of segments, if they are read already.
        accepted: names of tables that may have changed since.

    Raises:
        UserError: a table cannot be opened, or it is not the one that the model was trained with.
    """
    if not config.content:
        return None
    tables = open_tables(config) if tables is None else tables
    segments = open_segments(config, dataset, tables) if segments is None else segments
    check_tables(config, fitted, tables, accepted, segments)
    return ContentReader(config.content, tables, segments)
