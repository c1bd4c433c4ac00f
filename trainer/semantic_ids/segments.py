"""Vectors of a dataset's segments with room, author and the time from which each is known: memory-mapped, in blocks.

The id of a vector is the id of its segment (``trainer/data/format/segments.py``) in code files and in the store of
recent codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.config.load import parse_time
from trainer.config.quantize import QuantizeDataConfig
from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.content_vectors import SEGMENT_VECTORS, ContentVectors
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segments import DatasetSegments, has_text_ids, segments_hash
from trainer.semantic_ids.code_store import GAP_MS
from trainer.semantic_ids.vector_source import LARGEST_MAGNITUDE, StoredVectors, chunks, find_finite

NO_LIMIT_MS = (1 << 62) - 1


class TimeRange(NamedTuple):
    """Range of ``known_ms``: ``from_ms`` is inside, ``until_ms`` outside."""

    from_ms: int = 0
    until_ms: int = NO_LIMIT_MS

    def __contains__(self, known_ms: object) -> bool:
        return isinstance(known_ms, int) and self.from_ms <= known_ms < self.until_ms


class BadVectors(NamedTuple):
    """Numbers of vectors that no codebook takes, and the id of the first one.

    Attributes:
        not_finite: vectors with NaN, infinity, or an element above ``LARGEST_MAGNITUDE``.
        zero: vectors of length 0.
        first_id: id of the first of them; -1 if there is none.
    """

    not_finite: int
    zero: int
    first_id: int

    def __add__(self, other: BadVectors) -> BadVectors:  # type: ignore[override]
        """Add counts; ``self`` is of earlier rows."""
        first = self.first_id if self.first_id >= 0 else other.first_id
        return BadVectors(self.not_finite + other.not_finite, self.zero + other.zero, first)

    def refuse(self, place: object, count: int) -> None:
        """Do nothing if there is no bad vector.

        Raises:
            UserError: there is one; the message has the numbers of them.
        """
        if self.not_finite or self.zero:
            raise UserError(
                f"{place}: {self.not_finite:,} of {count:,} vectors are not finite and {self.zero:,} are zero, the "
                f"first is that of segment {self.first_id}; a codebook takes finite vectors that are not zero, "
                f"with elements up to {LARGEST_MAGNITUDE:g}"
            )


@dataclass(frozen=True)
class SegmentVectors:
    """Segment vectors of a dataset, in the order of the rows of their table.

    Attributes:
        table: the vectors, memory-mapped.
        item_id: ``[n] int64``, room of each vector.
        author_id: ``[n] int64``, author of the room; ``UNKNOWN_AUTHOR`` if the dataset does not have the room.
        start_ms: ``[n] int64``.
        known_ms: ``[n] int64``, time from which a segment is known.
        without_vector: number of segments of the dataset that have no vector.
        timezone: IANA name of the dataset's time zone.
    """

    table: ContentVectors
    item_id: np.ndarray
    author_id: np.ndarray
    start_ms: np.ndarray
    known_ms: np.ndarray
    without_vector: int
    timezone: str

    def __len__(self) -> int:
        return len(self.known_ms)

    @staticmethod
    def open(dataset: str, vectors: str = "") -> SegmentVectors:
        """Open the segment vectors of a dataset.

        Args:
            dataset: path or URL of the dataset.
            vectors: directory of the table; empty for ``embeddings/segments`` of the dataset.

        Raises:
            UserError: dataset or table are missing or damaged, the dataset has no times of its segments, or the table
                has a vector of a segment that the dataset does not have, or was made from others with the same ids.
        """
        timezone = DatasetSpec.load(dataset).timezone
        place = vectors or storage.join(dataset, SEGMENT_VECTORS)
        if storage.is_remote(place):
            raise UserError(f"{place}: segment vectors are memory-mapped; copy them to a local path (data.vectors)")
        table = ContentVectors.open(place)
        if not len(table):
            raise UserError(f"{place}: has no vectors; a codebook needs some")
        found = DatasetSegments.read(dataset, has_text_ids(table.origin))
        row = found.rows_of(table.ids)
        if (row < 0).any():
            raise UserError(
                f"{place}: has a vector of segment {table.ids[np.argmin(row)]}, which {found.source} does not have; "
                "make the vectors from this dataset"
            )
        found.check_table(table)
        return SegmentVectors(
            table,
            item_id=found.item_id[row],
            author_id=found.author_id[row],
            start_ms=found.start_ms[row],
            known_ms=found.known_ms[row],
            without_vector=len(found) - len(table),
            timezone=timezone,
        )

    def hash(self, rows: np.ndarray) -> str:
        """Return the hash of the segments of some rows, which ascend, for tables of other vectors of them."""
        columns = (self.table.ids, self.item_id, self.author_id, self.start_ms, self.known_ms)
        return segments_hash(*(column[rows] for column in columns))

    def rows(self, times: TimeRange) -> np.ndarray:
        """Return the rows ``[m] int64`` of the segments that became known in a range, ascending."""
        return np.flatnonzero((self.known_ms >= times.from_ms) & (self.known_ms < times.until_ms))

    def source(self, rows: np.ndarray, digest: str = "") -> StoredVectors:
        """Return the vectors of some rows, which ascend, as k-means reads them; ``digest`` is a hash of them."""
        return StoredVectors(str(self.table.path), self.table.vectors, digest or self.table.hash, rows)

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield places in ``rows``, which ascend, and their vectors ``[m, dim]``, in order."""
        source = self.source(rows)
        for chunk in chunks(source, 0, source.count):
            yield slice(chunk.first, chunk.first + len(chunk.vectors)), chunk.vectors

    def time_range(self, time_from: str | None, time_until: str | None) -> TimeRange:
        """Return the range of ``known_ms`` that two options of a command give.

        Raises:
            UserError: a time is no ISO time, or the range ends before it begins.
        """
        return range_of_options(time_from, time_until, self.timezone)

    def ranges(self, data: QuantizeDataConfig) -> tuple[TimeRange, TimeRange | None]:
        """Return the ranges of fitting and of evaluation; None if nothing is held out.

        Raises:
            UserError: a time is no ISO time, a range ends before it begins, or a segment would be in both.
        """
        keys = {f"data.{name}": getattr(data, name) for name in ("fit_from", "fit_until", "eval_from", "eval_until")}
        return split_time(keys, "fit", self.timezone)

    def neighbours(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return positions in ``rows`` of the pairs of neighbouring segments of a room: the earlier and the later one.

        Segments of a room are in the order of ``known_ms``, then of their id. Two that follow each other are neighbours
        if at most five minutes are between them.
        """
        order = np.lexsort((self.table.ids[rows], self.known_ms[rows], self.item_id[rows]))
        room, known_ms = self.item_id[rows][order], self.known_ms[rows][order]
        near = (room[1:] == room[:-1]) & (known_ms[1:] - known_ms[:-1] <= GAP_MS)
        return order[:-1][near], order[1:][near]


def range_of_options(time_from: str | None, time_until: str | None, timezone: str) -> TimeRange:
    """Return the range of ``known_ms`` of the options ``--from`` and ``--until`` of a command.

    Raises:
        UserError: a time is no ISO time, or the range ends before it begins.
    """
    return parse_range(("--from", time_from or "", 0), ("--until", time_until or "", NO_LIMIT_MS), timezone)


def split_time(keys: Mapping[str, str], what: str, timezone: str) -> tuple[TimeRange, TimeRange | None]:
    """Return a range from which something is learnt, and the held-out range; None if nothing is held out.

    Args:
        keys: key -> ISO time or nothing, of the begin and the end of the first range, then of the held-out one.
        what: name of what is learnt, for a message.
        timezone: of times without one.

    Raises:
        UserError: a time is no ISO time, a range ends before it begins, or the ranges overlap.
    """
    (begin, end, eval_begin, eval_end) = keys.items()
    first = parse_range((*begin, 0), (*end, NO_LIMIT_MS), timezone)
    if not eval_begin[1] and not end[1]:
        return first, None
    held_out = parse_range((*eval_begin, first.until_ms), (*eval_end, NO_LIMIT_MS), timezone)
    if held_out.from_ms < first.until_ms and first.from_ms < held_out.until_ms:
        raise UserError(
            f"{eval_begin[0]} = {eval_begin[1]!r}: the held-out range overlaps the range of the {what}, which ends at "
            f"{end[0]} = {end[1]!r}; begin it there or later"
        )
    return first, held_out


def parse_range(begin: tuple[str, str, int], end: tuple[str, str, int], timezone: str) -> TimeRange:
    """Return a range from the key, the text and the default of its begin and of its end."""
    from_ms, until_ms = (parse_time(text, timezone, key) if text else default for key, text, default in (begin, end))
    if from_ms >= until_ms or until_ms <= 0:
        raise UserError(f"{end[0]} = {end[1]!r} must be later than {begin[0]}, the begin of the range")
    # No segment is known before 1970.
    return TimeRange(max(0, from_ms), until_ms)


def hash_vectors(segments: SegmentVectors, rows: np.ndarray) -> str:
    """Read the vectors of some rows once, and return a hash of ids and vectors.

    Raises:
        UserError: there is no vector, or some are not finite or zero.
    """
    if not len(rows):
        raise UserError(f"{segments.table.path}: no segment became known in the range of time; choose another one")
    digest, bad = hashlib.blake2b(digest_size=16), BadVectors(0, 0, -1)
    for at, vectors in segments.blocks(rows):
        ids = segments.table.ids[rows[at]]
        bad += find_bad_vectors(ids, vectors)
        digest.update(ids.tobytes())
        digest.update(vectors.tobytes())
    bad.refuse(segments.table.path, len(rows))
    return digest.hexdigest()


def require_segments(segments: SegmentVectors, times: TimeRange, levels: tuple[int, ...]) -> None:
    """Check that a range of time has as many segments as the largest level has codes.

    Raises:
        UserError: it has fewer.
    """
    count = len(segments.rows(times))
    if count < max(levels):
        raise UserError(
            f"{segments.table.path}: {count:,} segments became known in the range of the fit, and a level has "
            f"{max(levels):,} codes; fit on a longer range, or use fewer codes"
        )


def find_bad_vectors(ids: np.ndarray, vectors: np.ndarray) -> BadVectors:
    """Count the vectors ``[n, dim]`` that are not finite or zero; ``ids [n]`` are those of their segments."""
    finite = find_finite(vectors)
    zero = ~vectors.any(axis=1)
    bad = ~finite | zero
    return BadVectors(int((~finite).sum()), int(zero.sum()), int(ids[np.argmax(bad)]) if bad.any() else -1)
