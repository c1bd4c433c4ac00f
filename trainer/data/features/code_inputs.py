"""Codes of segments as inputs of the ranker: tables, lookups, and the rows of candidates and of past visits.

A code set is one code file with the codes of one codebook version. The candidate has the codes of the latest segment of
its author, an entry of a history those of the segment that was on air while the user watched (LARM, section 3.4). Both
are read as of the row's time: a segment that becomes known later changes nothing.

Each level has a table, and each prefix of levels has one: a prefix of j levels is the number of its tuple of codes, the
last level counting fastest. Row 0 of each table stands for "no code".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from modules.embeddings import Table
from trainer.config.features import CodesConfig, FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.code_sets import CodeSet
from trainer.data.features.fitted_codes import FittedCodes, identity_of
from trainer.data.features.missing_inputs import CODE, MissingCounts
from trainer.data.features.segment_index import SegmentChanges, SegmentIndex
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.format.segment_codes import CodeFile, read_code_header

_LIVE = DOMAINS.index("live")


class CodeReader(Protocol):
    """Codes of a code set, read as of a time; the answers are rows of its tables, one array for each table."""

    def candidate_rows(self, author_id: np.ndarray, as_of_ms: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows ``[n]`` of each author's latest codes that were known at a time; 0 without any.

        Raises:
            UserError: the codes cannot be read.
        """

    def entry_rows(self, visits: HistorySlice, as_of_ms: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows of what was on air in each past visit, of what was known at a time; 0 without any.

        Args:
            visits: entries of histories.
            as_of_ms: time of each entry's row, one for each entry.
        """

    def entry_changes(self, visits: HistorySlice, from_ms: np.ndarray) -> SegmentChanges:
        """Return what was on air in each past visit, for every time from ``from_ms`` on, ``[visits]`` int64.

        The row of a place in each table is in :meth:`rows_of_places`.
        """

    def rows_of_places(self) -> Sequence[np.ndarray]:
        """Return the row of each place in each table, ``[places + 1]`` int32; the last one stands for no segment."""


class CodeFileReader:
    """Codes of a code file, in memory; see :class:`CodeReader`.

    Args:
        code_set: its tables.
        codes: content of the file.

    Raises:
        UserError: histories have codes, and the file does not have the starts of the segments.
    """

    def __init__(self, code_set: CodeSet, codes: CodeFile) -> None:
        if code_set.in_histories and codes.start_ms is None:
            raise UserError(
                f"features.codes.{code_set.name}.history = {code_set.config.history!r}: {codes.path} has no start_ms, "
                'so what was on air during a visit is not known; assign the codes again, or set history = "none"'
            )
        # In the order of ids: of segments known at one time the last one counts, as in a store of recent codes.
        order = np.argsort(codes.segment, kind="stable")
        start_ms = codes.known_ms if codes.start_ms is None else codes.start_ms
        columns = (codes.author_id, codes.item_id, start_ms, codes.known_ms)
        self._index = SegmentIndex(*(column[order] for column in columns))
        self._known_ms = np.append(codes.known_ms[order], -1)
        self._choice: Literal["entry", "longest"] = "longest" if code_set.config.history == "longest" else "entry"
        # Place -1, no segment, is the last one here. Half the memory of int64, and no table has 2^31 rows.
        no_code = np.zeros(1, np.int32)
        rows = code_set.rows_of(codes.codes[order, : len(code_set.levels)])
        self._rows = [np.concatenate([of_table.astype(np.int32), no_code]) for of_table in rows]
        # A read of nothing compiles the loops before worker processes are forked.
        nothing = np.zeros(0, np.int64)
        self._index.latest(nothing, nothing)
        self._index.on_air(nothing, nothing, nothing, nothing, self._choice)

    def candidate_rows(self, author_id: np.ndarray, as_of_ms: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows of each author's latest codes; see :class:`CodeReader`."""
        places = self._index.latest(author_id, as_of_ms)
        return [rows[places] for rows in self._rows]

    def latest_ms(self, author_id: np.ndarray, as_of_ms: np.ndarray) -> np.ndarray:
        """Return the time from which these latest codes are known, ``[n]`` int64; -1 without any."""
        latest: np.ndarray = self._known_ms[self._index.latest(author_id, as_of_ms)]
        return latest

    def entry_rows(self, visits: HistorySlice, as_of_ms: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows of what was on air in each past visit; see :class:`CodeReader`."""
        places = self._index.watched(visits, as_of_ms, self._choice)
        return [rows[places] for rows in self._rows]

    def entry_changes(self, visits: HistorySlice, from_ms: np.ndarray) -> SegmentChanges:
        """Return what was on air in each past visit, for every time; see :class:`CodeReader`."""
        return self._index.changes(visits, from_ms, self._choice)

    def rows_of_places(self) -> Sequence[np.ndarray]:
        """Return the row of each place in each table; see :class:`CodeReader`."""
        return self._rows


class StoredRuns(Protocol):
    """Latest runs of codes of n authors, as ``trainer.semantic_ids.code_store.RecentRuns``.

    Attributes:
        counts: ``[n]`` int64, runs of each author.
        code: ``[counts.sum()]`` int32, number of the tuple of codes of each run.
        last_ms: ``[counts.sum()]`` int64, ``known_ms`` of the last segment of each run.
    """

    @property
    def counts(self) -> np.ndarray: ...
    @property
    def code(self) -> np.ndarray: ...
    @property
    def last_ms(self) -> np.ndarray: ...


class RecentCodes(Protocol):
    """Reading half of a store of recent codes."""

    def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> StoredRuns:
        """Return the latest runs, see ``trainer.semantic_ids.code_store.CodeStore.recent``."""

    def close(self) -> None:
        """Close the connection."""


OpenStore = Callable[[str, str], RecentCodes]
"""Function from the address of a store, and the name of the codebook version, to the opened store."""


class CodeStoreReader:
    """Codes of candidates from a file and, for later requests, from a store of recent codes; see :class:`CodeReader`.

    The file answers requests up to its last segment: a store does not keep old ones. For later requests the store is
    asked too, and the segment that became known last counts, whichever of the two has it. Past visits are read from the
    file.

    Args:
        code_set: its tables.
        codes: content of the file; the store numbers the tuples of all of its levels.
        open_store: function that opens the store.

    Raises:
        UserError: the store is not there, cannot be read, or is of another codebook version.
    """

    def __init__(self, code_set: CodeSet, codes: CodeFile, open_store: Callable[[], RecentCodes]) -> None:
        self._set, self._levels, self._open = code_set, codes.levels, open_store
        self._file, self._until_ms = CodeFileReader(code_set, codes), int(codes.known_ms.max(initial=-1))
        self._store, self._process = open_store(), os.getpid()

    def candidate_rows(self, author_id: np.ndarray, as_of_ms: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows of each author's latest codes; see :class:`CodeReader`."""
        of_file = self._file.candidate_rows(author_id, as_of_ms)
        later = np.flatnonzero(as_of_ms > self._until_ms)
        if not len(later):
            return of_file
        if self._process != os.getpid():
            # A connection must not be used on both sides of a fork.
            self._store, self._process = self._open(), os.getpid()
        found = self._store.recent(author_id[later], as_of_ms[later], 1)
        newer = found.last_ms > self._file.latest_ms(author_id[later], as_of_ms[later])[found.counts > 0]
        number = found.code[newer].astype(np.int64)
        codes = np.empty((len(number), len(self._levels)), np.int32)
        for level in range(len(self._levels) - 1, -1, -1):
            number, codes[:, level] = np.divmod(number, self._levels[level])
        replaced = later[found.counts > 0][newer]
        for rows, of_store in zip(of_file, self._set.rows_of(codes[:, : len(self._set.levels)]), strict=True):
            rows[replaced] = of_store
        return of_file

    def entry_rows(self, visits: HistorySlice, as_of_ms: np.ndarray) -> Sequence[np.ndarray]:
        """Return the rows of what was on air in each past visit; see :class:`CodeReader`."""
        return self._file.entry_rows(visits, as_of_ms)

    def entry_changes(self, visits: HistorySlice, from_ms: np.ndarray) -> SegmentChanges:
        """Return what was on air in each past visit, for every time; see :class:`CodeReader`."""
        return self._file.entry_changes(visits, from_ms)

    def rows_of_places(self) -> Sequence[np.ndarray]:
        """Return the row of each place in each table; see :class:`CodeReader`."""
        return self._file.rows_of_places()


class CodeInputs:
    """Inputs of a model from its code sets: tables, lookups, and the ids of a batch.

    Args:
        config: sections ``[features.codes.NAME]`` by name.
        fitted: identities of the codes with which the model was trained.
        readers: code set -> its codes; a model that makes no batches needs none.

    Attributes:
        sets: the code sets, in the order of the job file.
        tables: declarations of their tables.
        lookups: names of the candidate's lookups, each with one id from the table of the same name.
        of_entries: those of them that the entries of histories have as well.

    Raises:
        UserError: a code set is not one of the model.
    """

    def __init__(
        self, config: Mapping[str, CodesConfig], fitted: Mapping[str, FittedCodes], readers: Mapping[str, CodeReader]
    ) -> None:
        self.sets = [CodeSet(name, own, identity_of(name, fitted).levels) for name, own in config.items()]
        self.tables: list[Table] = [table for code_set in self.sets for table in code_set.declare()]
        self.lookups: list[str] = [table.name for table in self.tables]
        self.of_entries: list[str] = [
            table.name for code_set in self.sets if code_set.in_histories for table in code_set.tables
        ]
        self._readers = readers

    def fill(
        self, rows: Rows, slices: Mapping[str, HistorySlice], as_of_ms: np.ndarray, ids: Mapping[str, np.ndarray]
    ) -> dict[str, MissingCounts]:
        """Write the ids of all lookups of codes, and return the numbers of those without a code.

        Args:
            rows: n canonical rows.
            slices: history -> entries of the n rows.
            as_of_ms: ``[n]`` int64.
            ids: lookup -> its ids, int64; written. The lookup of table T for the entries of history H is ``H_T``.

        Raises:
            UserError: the codes cannot be read.
        """
        counts = {}
        of_entries = {name: np.repeat(as_of_ms, visits.lengths) for name, visits in slices.items()}
        for code_set in self.sets:
            reader = self._readers[code_set.name]
            found = reader.candidate_rows(rows["author_id"], as_of_ms)
            for table, values in zip(code_set.tables, found, strict=True):
                ids[table.name][:] = values
            missing, entries, all_entries = int((found[0] == 0).sum()), 0, 0
            for name, visits in slices.items() if code_set.in_histories else ():
                found = reader.entry_rows(visits, of_entries[name])
                for table, values in zip(code_set.tables, found, strict=True):
                    ids[f"{name}_{table.name}"][:] = values
                live = visits.domain == _LIVE
                entries += int((found[0][live] == 0).sum())
                all_entries += int(live.sum())
            counts[f"{CODE}{code_set.name}"] = MissingCounts(missing, len(as_of_ms), entries, all_entries)
        return counts

    def of_histories(self) -> list[tuple[CodeSet, CodeReader]]:
        """Return the code sets that entries of histories have, with their codes."""
        return [(code_set, self._readers[code_set.name]) for code_set in self.sets if code_set.in_histories]

    def same_code(self, rows: Rows, visits: HistorySlice) -> dict[str, np.ndarray]:
        """Return for each code set of histories which visits had the candidate's code of the first level.

        Args:
            rows: one row.
            visits: entries of one of its histories.

        Returns:
            Code set -> ``[entries]`` bool; False without a code.
        """
        found = {}
        for code_set, reader in self.of_histories():
            as_of_ms = rows["request_ms"]
            own = reader.candidate_rows(rows["author_id"], as_of_ms)[0]
            past = reader.entry_rows(visits, np.repeat(as_of_ms, len(visits.item_id)))[0]
            found[code_set.name] = (past == own) & (past > 0)
        return found


def check_codes(config: Mapping[str, CodesConfig], open_store: OpenStore | None = None) -> list[CodeSet]:
    """Check code files by their footers only, and stores, before anything is fitted; return the code sets.

    Args:
        config: sections ``[features.codes.NAME]`` by name.
        open_store: function that opens stores of recent codes; None does not check them.

    Raises:
        UserError: a file is missing or no code file, or has fewer levels than the job asks for; a store is missing,
            cannot be read, or is of another codebook version than its file.
    """
    sets = []
    for name, own in config.items():
        header = read_code_header(Path(own.file))
        if own.levels is not None and own.levels > len(header.levels):
            raise UserError(
                f"features.codes.{name}.levels = {own.levels}: {own.file} has {len(header.levels)} levels; 1 to "
                f"{len(header.levels)} are accepted"
            )
        if own.store and open_store is not None:
            open_store(own.store, header.version).close()
        sets.append(CodeSet(name, own, header.levels))
    return sets


def open_codes(
    config: FeatureConfig,
    fitted: Mapping[str, FittedCodes],
    open_store: OpenStore | None = None,
    *,
    unchanged: bool = False,
) -> dict[str, CodeReader]:
    """Open the code sets of a model.

    Args:
        config: the ``[features]`` section of the job.
        fitted: identities of the codes with which the model was trained.
        open_store: function that opens stores of recent codes; a job without any needs none.
        unchanged: the segments that the file had then must be as they were; later ones may have been added.

    Raises:
        UserError: a file or store cannot be read or is of another codebook version, or a file has changed.
    """
    readers: dict[str, CodeReader] = {}
    for name, own in config.codes.items():
        where, path, identity = f"features.codes.{name}", Path(own.file), identity_of(name, fitted)
        header = read_code_header(path)
        identity.check_version(where, path, header.version, header.levels)
        codes = CodeFile.read(path)
        if unchanged:
            identity.check_unchanged(where, codes)
        code_set = CodeSet(name, own, codes.levels)
        if own.store:
            assert open_store is not None, "a code set has a store, and nothing opens it"
            readers[name] = CodeStoreReader(code_set, codes, partial(open_store, own.store, codes.version))
        else:
            readers[name] = CodeFileReader(code_set, codes)
    return readers
