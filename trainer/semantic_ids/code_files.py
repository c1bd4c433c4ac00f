"""Codes of a dataset's segments by a codebook version: written to a code file, appended to a store, read as runs.

The layout of a code file is in ``trainer/data/format/segment_codes.py``. A file is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.progress import Progress
from trainer.data.format.segment_codes import CodeDigests, CodeFile, code_schema
from trainer.data.format.segments import UNKNOWN_AUTHOR
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
from trainer.semantic_ids.segments import BadVectors, SegmentVectors, TimeRange, find_bad_vectors
from trainer.semantic_ids.store_address import open_store, store_path

APPENDED_ROWS = 1 << 13
"""Segments of one call that appends to a store."""


def read_codes(path: Path, version: CodebookVersion) -> CodeFile:
    """Read a code file of a codebook version.

    Raises:
        UserError: there is no such file, it is no code file, is damaged, or is of another version.
    """
    codes = CodeFile.read(path)
    version.check_name(path, codes.version)
    return codes


def append_codes(codes: CodeFile, store: CodeStore, version: CodebookVersion, *, quiet: bool = False) -> AppendCounts:
    """Append the segments with a known author to a store, in the order in which they became known.

    Appending twice changes nothing, so a call that failed is repeated.

    Raises:
        UserError: the store cannot be written, or cannot number so many tuples of codes.
    """
    order = np.lexsort((codes.segment, codes.known_ms))
    order = order[codes.author_id[order] != UNKNOWN_AUTHOR]
    number = version.numbers(codes.codes)
    counts = AppendCounts(0, 0, 0, 0)
    with Progress("appending", len(order), "segments", quiet=quiet) as progress:
        for begin in range(0, len(order), APPENDED_ROWS):
            rows = order[begin : begin + APPENDED_ROWS]
            counts += store.append(
                SegmentCodes(codes.author_id[rows], codes.segment[rows], number[rows], codes.known_ms[rows])
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
    schema = code_schema(version.name, version.levels)
    digests, bad, error_sum = CodeDigests(len(version.levels)), BadVectors(0, 0, -1), 0.0
    with (
        whole_file(out) as tmp_path,
        Progress("assigning", len(rows), "segments", quiet=quiet) as progress,
        pq.ParquetWriter(tmp_path, schema, compression="zstd") as writer,
    ):
        for columns, start_ms, vectors in _blocks(segments, rows):
            bad += find_bad_vectors(columns["segment"], vectors)
            if not bad.not_finite and not bad.zero:
                codes, error = version.encode(vectors)
                digests.add(columns, codes, start_ms)
                error_sum += float(error.sum(dtype=np.float64))
                writer.write_table(pa.table([*columns.values(), *codes.T, start_ms], schema=schema))
            progress.advance(len(vectors))
        # After all vectors have been looked at, so that the numbers are complete.
        bad.refuse(segments.table.path, len(rows))
        writer.add_key_value_metadata(digests.metadata)
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
            document["store"] = append_codes(read_codes(out, version), opened, version, quiet=quiet)._asdict()
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


def _blocks(
    segments: SegmentVectors, rows: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """Yield the columns before the codes, the starts, and the vectors, of rows of the table."""
    for at, block in segments.blocks(rows):
        columns = {
            "item_id": segments.item_id[rows[at]],
            "author_id": segments.author_id[rows[at]],
            "segment": np.asarray(segments.table.ids[rows[at]]),
            "known_ms": segments.known_ms[rows[at]],
        }
        yield columns, segments.start_ms[rows[at]], block
