"""Codes of segments as inputs of the ranker: tables, lookups, and the rows of candidates and of past visits.

A code set is one code file with the codes of one codebook version. The candidate has the codes of the latest segment of
its author, an entry of a history those of the segment that was on air while the user watched (LARM, section 3.4). Both
are read as of the row's time: a segment that becomes known later changes nothing.

Each level has a table, and each prefix of levels has one: a prefix of j levels is the number of its tuple of codes, the
last level counting fastest. Row 0 of each table stands for "no code".
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from modules.embeddings import Table
from trainer.config.features import CodesConfig, FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.id_map import hash_rows, hash_salt
from trainer.data.features.missing_inputs import CODE, MissingCounts
from trainer.data.features.segment_index import SegmentIndex
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.format.segment_codes import CodeFile, read_code_header

NO_CODE = -1

CODE_TABLE = "codes-"
"""Beginning of the names of all tables of codes."""

_LIVE = DOMAINS.index("live")


@dataclass(frozen=True)
class FittedCodes:
    """Identity of the codes that a model was trained with.

    Attributes:
        version: name of the codebook version.
        levels: number of codes of each level of the file.
        hash: of the file's columns.
        until_ms: largest ``known_ms`` of the file; -1 if it has no segment.
        known: hash of the segments with ``known_ms`` up to this time, whatever their order.
    """

    version: str
    levels: tuple[int, ...]
    hash: str
    until_ms: int
    known: str

    @staticmethod
    def of(codes: CodeFile) -> FittedCodes:
        """Return the identity of a code file."""
        until_ms = int(codes.known_ms.max(initial=-1))
        return FittedCodes(codes.version, codes.levels, codes.hash, until_ms, _hash_known(codes, until_ms))

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> FittedCodes:
        """Return the identity that ``vars`` turned into JSON types.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or has another type.
        """
        levels = tuple(int(size) for size in document["levels"])
        if not levels or min(levels) < 1:
            raise ValueError(f"codes with the levels {levels}")
        texts = {name: str(document[name]) for name in ("version", "hash", "known")}
        return FittedCodes(levels=levels, until_ms=int(document["until_ms"]), **texts)

    def check_version(self, where: str, path: Path, version: str, levels: Sequence[int]) -> None:
        """Check that a code file is of the model's codebook version.

        Raises:
            UserError: it is of another one.
        """
        if (version, tuple(levels)) != (self.version, self.levels):
            raise UserError(
                f"{where}: {path} is of the codebook version {version!a:.120}, the model was trained with "
                f"{self.version!a:.120}; name a code file of that version"
            )

    def check_unchanged(self, where: str, codes: CodeFile) -> None:
        """Check that a code file has the codes of the training, beside segments that became known later.

        Raises:
            UserError: a segment is missing, is new, or has other codes or times.
        """
        if codes.hash != self.hash and _hash_known(codes, self.until_ms) != self.known:
            raise UserError(
                f"{where}: {codes.path} has other codes than at the start of the run, for segments that were in the "
                "file then (later segments may be added); resume.allow_new_data=true accepts it"
            )


class SegmentCodeTable(NamedTuple):
    """A table of a code set.

    Attributes:
        name: of the table, and of the candidate's lookup.
        kind: ``level``: the code of the level ``depth``. ``prefix``: the codes of the levels up to ``depth``.
        depth: number of a level, from 1.
        tuples: number of its codes, or of its tuples of codes.
        rows: rows of the table, row 0 included.
    """

    name: str
    kind: Literal["level", "prefix"]
    depth: int
    tuples: int
    rows: int

    @property
    def hashed(self) -> bool:
        """True if the table has fewer rows than there are tuples, so that their numbers are hashed."""
        return self.rows <= self.tuples


class CodeSet:
    """Tables of one code set.

    Args:
        name: of the set.
        config: the section ``[features.codes.NAME]``.
        levels: number of codes of each level of the file.

    Attributes:
        name: as given.
        config: as given.
        levels: number of codes of each level that is used.
        tables: its tables, first those of levels, then those of prefixes.
        in_histories: True if entries of histories have codes.
    """

    def __init__(self, name: str, config: CodesConfig, levels: Sequence[int]) -> None:
        self.name, self.config = name, config
        self.levels = tuple(levels[: config.levels])
        self.in_histories = config.history != "none"
        depths = range(1, len(self.levels) + 1)
        tables = []
        if config.tables != "prefixes":
            tables += [self._table("level", depth, self.levels[depth - 1]) for depth in depths]
        if config.tables != "levels":
            # The prefix of one level is the code of this level, which may have a table already.
            first = 1 if config.tables == "prefixes" else 2
            tables += [self._table("prefix", depth, math.prod(self.levels[:depth])) for depth in depths[first - 1 :]]
        self.tables: tuple[SegmentCodeTable, ...] = tuple(tables)

    def _table(self, kind: Literal["level", "prefix"], depth: int, count: int) -> SegmentCodeTable:
        rows = count + 1 if kind == "level" else min(count + 1, self.config.prefix_rows)
        return SegmentCodeTable(f"{CODE_TABLE}{self.name}-{kind}{depth}", kind, depth, count, rows)

    def declare(self) -> list[Table]:
        """Return the declarations of the tables."""
        own = self.config
        return [Table(table.name, table.rows, own.dim, own.init, own.init_scale, own.sharding) for table in self.tables]

    def rows_of(self, codes: np.ndarray) -> list[np.ndarray]:
        """Return the row of each tuple of codes in each table, ``[n]`` int64.

        Args:
            codes: ``[n, levels]`` int32; ``NO_CODE`` in the first column means that there is no code.
        """
        missing = codes[:, 0] < 0
        found = []
        for table in self.tables:
            if table.kind == "level":
                rows = codes[:, table.depth - 1].astype(np.int64) + 1
            else:
                number = np.zeros(len(codes), np.int64)
                # Products above 2^63 wrap around; such prefixes are hashed in any case.
                for level in range(table.depth):
                    number = number * self.levels[level] + codes[:, level]
                rows = number + 1
                if table.hashed:
                    hash_rows(number, hash_salt(table.name), table.rows, rows)
            rows[missing] = 0
            found.append(rows)
        return found


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
        places = np.full(len(visits.item_id), -1)
        live = np.flatnonzero(visits.domain == _LIVE)
        begin_ms = visits.request_ms[live]
        # A visit that was left at once saw the moment of its entry.
        end_ms = begin_ms + np.maximum(visits.play_ms[live], 1)
        places[live] = self._index.on_air(visits.item_id[live], begin_ms, end_ms, as_of_ms[live], self._choice)
        return [rows[places] for rows in self._rows]


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
        self.sets = [CodeSet(name, own, _identity(name, fitted).levels) for name, own in config.items()]
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

    def same_code(self, rows: Rows, visits: HistorySlice) -> dict[str, np.ndarray]:
        """Return for each code set of histories which visits had the candidate's code of the first level.

        Args:
            rows: one row.
            visits: entries of one of its histories.

        Returns:
            Code set -> ``[entries]`` bool; False without a code.
        """
        found = {}
        for code_set in self.sets:
            if code_set.in_histories:
                reader, as_of_ms = self._readers[code_set.name], rows["request_ms"]
                own = reader.candidate_rows(rows["author_id"], as_of_ms)[0]
                past = reader.entry_rows(visits, np.repeat(as_of_ms, len(visits.item_id)))[0]
                found[code_set.name] = (past == own) & (past > 0)
        return found


def code_set_of(table: str) -> str:
    """Return the name of the code set of a table."""
    return table.removeprefix(CODE_TABLE).rpartition("-")[0]


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


def read_code_files(config: Mapping[str, CodesConfig]) -> dict[str, CodeFile]:
    """Return the content of each code set's file.

    Raises:
        UserError: a file cannot be read.
    """
    return {name: CodeFile.read(Path(own.file)) for name, own in config.items()}


def check_authors(codes: Mapping[str, CodeFile], parts: Iterable[np.ndarray]) -> None:
    """Check that each code file has segments of at least one author of a training range.

    Args:
        codes: code set -> content of its file.
        parts: authors of the rows, ``[n]`` int64 each; read until all files have one of them.

    Raises:
        UserError: a file has none; it is of another dataset, as a rule.
    """
    left = {name: np.unique(file.author_id) for name, file in codes.items()}
    for authors in parts if left else ():
        left = {name: known for name, known in left.items() if not np.isin(authors, known).any()}
        if not left:
            return
    for name in left:
        raise UserError(
            f"features.codes.{name}: {codes[name].path} has segments of no author of the training rows; assign codes "
            "to the dataset of the job"
        )


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
        where, path, identity = f"features.codes.{name}", Path(own.file), _identity(name, fitted)
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


def carry_codes(config: Mapping[str, CodesConfig], fitted: Mapping[str, FittedCodes], folder: Path) -> None:
    """Copy the code files of a model into a folder that is made, as ``NAME.parquet``; a model without any needs none.

    Raises:
        UserError: a file is missing, damaged, or of another codebook version.
        OSError: a file cannot be written.
    """
    for name, own in config.items():
        codes = CodeFile.read(Path(own.file))
        _identity(name, fitted).check_version(f"features.codes.{name}", codes.path, codes.version, codes.levels)
        folder.mkdir(exist_ok=True)
        shutil.copyfile(codes.path, folder / f"{name}.parquet")


def carried_codes(config: Mapping[str, CodesConfig], folder: Path) -> dict[str, CodesConfig]:
    """Return the sections with the code files that :func:`carry_codes` copied to a folder, where there are some."""
    carried = {name: folder / f"{name}.parquet" for name in config}
    return {
        name: own.model_copy(update={"file": str(carried[name])}) if carried[name].exists() else own
        for name, own in config.items()
    }


def _identity(name: str, fitted: Mapping[str, FittedCodes]) -> FittedCodes:
    if name not in fitted:
        raise UserError(f"features.codes.{name}: the model was trained without these codes; it has {_list(fitted)}")
    return fitted[name]


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _hash_known(codes: CodeFile, until_ms: int) -> str:
    """Return a hash of the segments with ``known_ms`` up to a time, in the order of their ids."""
    rows = np.flatnonzero(codes.known_ms <= until_ms)
    rows = rows[np.lexsort((codes.known_ms[rows], codes.segment[rows]))]
    digest = hashlib.blake2b(digest_size=16)
    for column in (codes.item_id, codes.author_id, codes.segment, codes.known_ms, codes.codes):
        digest.update(np.ascontiguousarray(column[rows]).tobytes())
    return digest.hexdigest()
