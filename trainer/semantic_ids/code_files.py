"""Code files: the codes of a dataset's segments by one codebook version, in one Parquet file.

Columns are ``item_id``, ``author_id``, ``segment`` (the id of the segment's vector) and ``known_ms``, all int64, and
``code_1``, ``code_2``, ... int32, one for each level. The metadata of the file has the name of the version, the sizes
of the levels, and a hash of all columns, which reading compares. Rows are in the order of the table of vectors.

A file is written whole or not at all. A segment whose author is not known has the author -1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table, table_footer
from trainer.runtime.files import whole_file
from trainer.semantic_ids.code_store import (
    GAP_MS,
    AppendCounts,
    CodeStore,
    RecentRuns,
    SegmentCodes,
    StoreSettings,
    run_starts,
)
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.segments import (
    UNKNOWN_AUTHOR,
    BadVectors,
    SegmentVectors,
    TimeRange,
    find_bad_vectors,
)
from trainer.semantic_ids.store_address import open_store, store_path

FORMAT = "1"
_KEYS = ("format", "version", "levels", "hash")
_PREFIX = "limelight_codes_"
_COLUMNS = ("item_id", "author_id", "segment", "known_ms")

APPENDED_ROWS = 1 << 13
"""Segments of one call that appends to a store."""


@dataclass(frozen=True)
class CodeFile:
    """Content of a code file.

    Attributes:
        path: of the file.
        version: name of the codebook version.
        levels: number of codes of each level.
        item_id, author_id, segment, known_ms: ``[n] int64``.
        codes: ``[n, levels] int32``.
    """

    path: Path
    version: str
    levels: tuple[int, ...]
    item_id: np.ndarray
    author_id: np.ndarray
    segment: np.ndarray
    known_ms: np.ndarray
    codes: np.ndarray

    def __len__(self) -> int:
        return len(self.segment)

    @staticmethod
    def read(path: Path, version: CodebookVersion | None = None) -> CodeFile:
        """Read a code file.

        Args:
            path: of the file.
            version: codebook version that it must be of; None accepts any.

        Raises:
            UserError: there is no such file, it is no code file, is damaged, or is of another version.
        """
        files, name = DatasetFiles(path.parent), path.name
        try:
            schema, footer = table_footer(files, name)
            metadata = footer | (schema.metadata or {})
            found = {key: metadata.get(f"{_PREFIX}{key}".encode()) for key in _KEYS}
            if found["format"] is None:
                raise UserError(f"{path}: no code file; `limelight quantize assign` makes one")
            if found["format"] != FORMAT.encode():
                raise UserError(f"{path}: format is {found['format']!r}; this release reads format {FORMAT}")
            levels = _levels(found["levels"])
            if levels is None or found["version"] is None or found["hash"] is None:
                raise UserError(f"{path}: damaged, its metadata is not complete; assign the codes again")
            code_names = _code_names(len(levels))
            table = read_table(files, name, [*_COLUMNS, *code_names])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `limelight quantize assign` makes a code file") from None
        if any(column.null_count or not pa.types.is_integer(column.type) for column in table.columns):
            raise UserError(f"{path}: damaged, a column has empty values or no whole numbers; assign the codes again")
        columns = {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS}
        codes = np.stack([table[name].to_numpy().astype(np.int32) for name in code_names], axis=1)
        digests = _Digests(len(levels))
        digests.add(columns, codes)
        if digests.hash != found["hash"].decode("ascii", "replace"):
            raise UserError(f"{path}: damaged, its content differs from its hash; assign the codes again")
        if (codes < 0).any() or (codes >= np.array(levels)).any():
            raise UserError(f"{path}: damaged, a code is not below the size of its level; assign the codes again")
        name_of_version = found["version"].decode("utf-8", "replace")
        if version is not None:
            version.check_name(path, name_of_version)
        return CodeFile(path, name_of_version, levels, **columns, codes=codes)

    def append_to(self, store: CodeStore, version: CodebookVersion, *, quiet: bool = False) -> AppendCounts:
        """Append the segments with a known author to a store, in the order in which they became known.

        Appending twice changes nothing, so a call that failed is repeated.

        Raises:
            UserError: the store cannot be written, or cannot number so many tuples of codes.
        """
        order = np.lexsort((self.segment, self.known_ms))
        order = order[self.author_id[order] != UNKNOWN_AUTHOR]
        number = version.numbers(self.codes)
        counts = AppendCounts(0, 0, 0, 0)
        with Progress("appending", len(order), "segments", quiet=quiet) as progress:
            for begin in range(0, len(order), APPENDED_ROWS):
                rows = order[begin : begin + APPENDED_ROWS]
                counts += store.append(
                    SegmentCodes(self.author_id[rows], self.segment[rows], number[rows], self.known_ms[rows])
                )
                progress.advance(len(rows))
        return counts


@dataclass(frozen=True)
class AssignedCodes:
    """Summary of an assignment.

    Attributes:
        segments: segments with a code.
        without_author: of these, segments of rooms that the dataset does not have.
        without_vector: segments of the dataset that have no vector, and so no code.
        mean_error: mean squared error.
    """

    segments: int
    without_author: int
    without_vector: int
    mean_error: float


def assign_codes(
    version: CodebookVersion, segments: SegmentVectors, times: TimeRange, out: Path, *, quiet: bool = False
) -> AssignedCodes:
    """Write the codes of the segments of a range of time to a code file, block by block.

    Raises:
        UserError: the vectors are of another dimension or model, some are not finite or zero, or the file cannot be
            written. Then an existing file stays as it was.
    """
    version.check_vectors(segments.table.path, segments.table.dim, segments.table.origin)
    rows = segments.rows(times)
    schema = pa.schema(
        [(name, pa.int64()) for name in _COLUMNS] + [(name, pa.int32()) for name in _code_names(len(version.levels))],
        {
            f"{_PREFIX}format": FORMAT,
            f"{_PREFIX}version": version.name,
            f"{_PREFIX}levels": json.dumps(list(version.levels)),
        },
    )
    digests, bad, error_sum = _Digests(len(version.levels)), BadVectors(0, 0, -1), 0.0
    with (
        whole_file(out) as tmp_path,
        Progress("assigning", len(rows), "segments", quiet=quiet) as progress,
        pq.ParquetWriter(tmp_path, schema, compression="zstd") as writer,
    ):
        for columns, vectors in _blocks(segments, rows):
            bad += find_bad_vectors(columns["segment"], vectors)
            if not bad.not_finite and not bad.zero:
                codes, error = version.encode(vectors)
                digests.add(columns, codes)
                error_sum += float(error.sum(dtype=np.float64))
                writer.write_table(pa.table([*columns.values(), *codes.T], schema=schema))
            progress.advance(len(vectors))
        # After all vectors have been looked at, so that the numbers are complete.
        bad.refuse(segments.table.path, len(rows))
        writer.add_key_value_metadata({f"{_PREFIX}hash": digests.hash})
    without_author = int((segments.author_id[rows] == UNKNOWN_AUTHOR).sum())
    return AssignedCodes(len(rows), without_author, segments.without_vector, error_sum / max(1, len(rows)))


def assign_to_file(
    version_path: str,
    dataset: str,
    out: Path,
    *,
    vectors: str = "",
    time_from: str | None = None,
    time_until: str | None = None,
    store: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do the work of ``limelight quantize assign``, and return its summary.

    Args:
        version_path: directory of the codebook version.
        dataset: dataset of the segments.
        out: code file to write.
        vectors: table of segment vectors; empty for the dataset's own.
        time_from, time_until: range of ``known_ms``, as ISO times in the dataset's time zone.
        store: address of a store of recent codes to append to.
        quiet: show no progress.

    Raises:
        UserError: version, segments, times or store cannot be used together, or the file cannot be written.
    """
    version = CodebookVersion.open(version_path)
    segments = SegmentVectors.open(dataset, vectors)
    times = segments.time_range(time_from, time_until)
    version.check_vectors(segments.table.path, segments.table.dim, segments.table.origin)
    opened = None
    if store is not None:
        version.check_numbers()
        path = store_path(store)
        if path is None or path.exists():
            # Before the long work, so that a store of another version costs no time; a new file is made after it.
            opened = open_store(store, StoreSettings(version.name))
    try:
        found = assign_codes(version, segments, times, out, quiet=quiet)
        document = {"version": version.name, **asdict(found)}
        if store is not None:
            opened = open_store(store, StoreSettings(version.name)) if opened is None else opened
            document["store"] = CodeFile.read(out, version).append_to(opened, version, quiet=quiet)._asdict()
    finally:
        if opened is not None:
            opened.close()
    return document


class CodesAsOf:
    """Codes of a code file, read as runs as of a time: the reading half of a :class:`CodeStore`, in memory.

    It answers as a store to which all segments of the file were appended, without a bound on what is kept.

    Args:
        codes: the file.
        number: ``[n] int32``, number of each tuple of codes.
        gap_ms: see ``code_store.py``.
    """

    def __init__(self, codes: CodeFile, number: np.ndarray, gap_ms: int = GAP_MS) -> None:
        order = np.lexsort((codes.segment, codes.known_ms, codes.author_id))
        order = order[codes.author_id[order] != UNKNOWN_AUTHOR]
        self._known_ms, self._code = codes.known_ms[order], number[order].astype(np.int32)
        self._authors, first = np.unique(codes.author_id[order], return_index=True)
        self._bounds = np.append(first, len(order)).astype(np.int64)
        self._starts = run_starts(codes.author_id[order], self._known_ms, self._code, gap_ms)

    def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RecentRuns:
        """Return the latest runs, see :meth:`trainer.semantic_ids.code_store.CodeStore.recent`."""
        begin, end = self._visible(authors, as_of_ms)
        # Runs of a row: those that begin in [begin, end); the last one is cut at end.
        first, last = np.searchsorted(self._starts, begin), np.searchsorted(self._starts, end)
        first = np.maximum(first, last - runs)
        counts = last - first
        place = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        starts = self._starts[place]
        next_start = np.append(self._starts, len(self._code))[place + 1]
        ends = np.minimum(next_start, np.repeat(end, counts))
        return RecentRuns(
            counts, self._code[starts], ends - starts, self._known_ms[starts], self._known_ms[np.maximum(ends, 1) - 1]
        )

    def _visible(self, authors: np.ndarray, as_of_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of the visible segments of each row."""
        begin = np.zeros(len(authors), np.int64)
        if not len(self._authors):
            return begin, begin
        at = np.minimum(np.searchsorted(self._authors, authors), len(self._authors) - 1)
        known = self._authors[at] == authors
        begin = np.where(known, self._bounds[at], 0)
        low, high = begin.copy(), np.where(known, self._bounds[at + 1], 0)
        while (low < high).any():
            middle = (low + high) // 2
            seen = (low < high) & (self._known_ms[np.minimum(middle, len(self._known_ms) - 1)] <= as_of_ms)
            low, high = np.where(seen, middle + 1, low), np.where(~seen & (low < high), middle, high)
        return begin, low


class _Digests:
    """Hash of the columns of a file, one digest a column, so that the blocks do not matter."""

    def __init__(self, levels: int) -> None:
        self._digests = [hashlib.blake2b(digest_size=16) for _ in range(len(_COLUMNS) + levels)]

    def add(self, columns: dict[str, np.ndarray], codes: np.ndarray) -> None:
        """Add rows."""
        arrays = [*(columns[name] for name in _COLUMNS), *codes.T]
        for digest, array in zip(self._digests, arrays, strict=True):
            digest.update(array.tobytes())

    @property
    def hash(self) -> str:
        """Hash of all columns."""
        return hashlib.blake2b(b"".join(digest.digest() for digest in self._digests), digest_size=16).hexdigest()


def _blocks(segments: SegmentVectors, rows: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield the columns without codes, and the vectors, of rows of the table."""
    for at, block in segments.blocks(rows):
        columns = {
            "item_id": segments.item_id[rows[at]],
            "author_id": segments.author_id[rows[at]],
            "segment": np.asarray(segments.table.ids[rows[at]]),
            "known_ms": segments.known_ms[rows[at]],
        }
        yield columns, block


def _code_names(levels: int) -> list[str]:
    return [f"code_{level + 1}" for level in range(levels)]


def _levels(text: bytes | None) -> tuple[int, ...] | None:
    """Return the sizes of levels from the metadata; None if it is damaged."""
    try:
        levels = json.loads(text or b"null")
    except ValueError:
        return None
    if not isinstance(levels, list) or not levels or any(type(size) is not int or size < 1 for size in levels):
        return None
    return tuple(levels)
