"""Reader of a cache of segment vectors: an author's latest vector and long-term mean as of a time.

The two are the inputs of LARM's alignment (section 3.3). Both see segments with ``known_ms <= as_of_ms`` only, so no
later segment changes an answer, bit for bit. A cache may be read while it is written.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ContentVectors, VectorPart, write_parts
from trainer.semantic_ids.vector_cache import AVERAGES, AuthorSums
from trainer.semantic_ids.vector_cache_parts import (
    CachePart,
    CacheRecord,
    CacheSettings,
    DamagedRecord,
    part_files,
)

_TRIES = 10

_EXPECTED = -1
"""Number of the part of a vector that is in no part yet; its place is the id of its segment."""

_NO_LIMIT = (1 << 63) - 1


@dataclass(frozen=True)
class LatestVectors:
    """Latest vectors of n authors.

    Attributes:
        vectors: ``[n, dim]`` in the cache's type; zeros for an author without a segment.
        segment: ``[n]`` int64, segment ids; -1 without a segment.
        known_ms: ``[n]`` int64; -1 without a segment.
    """

    vectors: np.ndarray
    segment: np.ndarray
    known_ms: np.ndarray


@dataclass(frozen=True)
class MeanVectors:
    """Mean vectors of n authors.

    Attributes:
        vectors: ``[n, dim]`` float32; zeros for an author without a segment.
        counts: ``[n]`` int64, segments in the mean.
    """

    vectors: np.ndarray
    counts: np.ndarray


@dataclass
class _Author:
    """Segments of an author in the order of ``known_ms`` and id, and their sum from the oldest to the newest.

    Attributes:
        known_ms, segment: times and ids.
        part, place: file of each vector, and its place there.
        sum: sum of all vectors; None if it has to be made again.
        removed: number of removed segments.
        removed_ms: newest time of a removed segment, -1 if none was removed.
    """

    base: np.ndarray
    removed: int = 0
    removed_ms: int = -1
    known_ms: array[int] = field(default_factory=lambda: array("q"))
    segment: array[int] = field(default_factory=lambda: array("q"))
    part: array[int] = field(default_factory=lambda: array("q"))
    place: array[int] = field(default_factory=lambda: array("q"))
    sum: np.ndarray | None = None

    def add(self, segment: int, known_ms: int, part: int, place: int, vector: np.ndarray) -> None:
        """Insert a segment."""
        at = len(self.known_ms)
        while at and (self.known_ms[at - 1], self.segment[at - 1]) > (known_ms, segment):
            at -= 1
        last = at == len(self.known_ms)
        for column, value in (
            (self.known_ms, known_ms),
            (self.segment, segment),
            (self.part, part),
            (self.place, place),
        ):
            column.insert(at, value)
        if last and self.sum is not None:
            self.sum = self.sum + vector
        elif not last:
            # A sum in another order may have other bits.
            self.sum = None

    def stored(self, segment: int, part: int, place: int) -> None:
        """Set file and place of a vector that was added before it was stored."""
        at = len(self.segment) - 1
        # Such a segment is one of the latest.
        while self.segment[at] != segment:
            at -= 1
        self.part[at], self.place[at] = part, place


class CachedVectors:
    """A cache that is open for reading. A context manager; call :meth:`refresh` to see later segments.

    Args:
        directory: directory of the cache.
        through: see :meth:`refresh`.

    Attributes:
        settings: width, type and origin of the vectors.

    Raises:
        UserError: there is no cache, or it is damaged.
    """

    def __init__(self, directory: str | Path, through: int = _NO_LIMIT) -> None:
        self._directory = Path(directory)
        self.settings = CacheSettings.read(self._directory)
        self._files = ExitStack()
        self._forget()
        self.refresh(through)

    def __enter__(self) -> CachedVectors:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __len__(self) -> int:
        return sum(len(author.segment) for author in self._authors.values())

    def refresh(self, through: int = _NO_LIMIT) -> None:
        """Read the records that were added since the last call.

        Args:
            through: sequence number of the last record to read.

        Raises:
            UserError: the cache is damaged.
        """
        for _ in range(_TRIES):
            try:
                self._read_new(through)
                return
            except FileNotFoundError:
                # The writer has removed a part after it was listed; its vectors are in the sums now.
                continue
        raise UserError(f"{self._directory}: its parts are removed faster than they are read; keep more hours")

    def expect(self, entries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Add segments that the caller is about to append to the cache, and return the mean vector as of each of them.

        The mean is that of :meth:`mean` for the author and the ``known_ms`` of the segment, over the segments of the
        cache and the expected ones. The record of these segments must be read by the next call of :meth:`refresh`.

        Args:
            entries: ``[n]`` of ``ENTRY``, segments that the cache does not have.
            vectors: ``[n, dim]`` in the cache's type.

        Returns:
            ``[n, dim]`` float32.

        Raises:
            UserError: a segment is from before a removed one of its author.
        """
        means = np.zeros((len(entries), self.settings.dim), np.float32)
        # In the order of time, so that a sum grows by one vector after the other and is not made again for each.
        order = np.lexsort((entries["id"], entries["known_ms"]))
        _, first = np.unique(entries["known_ms"][order], return_index=True)
        for rows in np.split(order, first[1:]):
            for row in rows.tolist():
                segment, author, known_ms = (int(entries[name][row]) for name in ("id", "author", "known_ms"))
                self._expected[segment] = vectors[row]
                self._author(author).add(segment, known_ms, _EXPECTED, segment, vectors[row])
            means[rows] = self.mean(entries["author"][rows], entries["known_ms"][rows]).vectors
        return means

    def removed_ms(self, author: int) -> int:
        """Return the newest time of a segment of an author that is only in a sum, -1 without one."""
        known = self._authors.get(author)
        return -1 if known is None else known.removed_ms

    def latest(self, authors: np.ndarray, as_of_ms: np.ndarray) -> LatestVectors:
        """Return the newest vector of each author as of a time.

        Args:
            authors: ``[n]`` int64.
            as_of_ms: ``[n]`` int64.

        Raises:
            UserError: the answer has been removed already.
        """
        found = LatestVectors(
            np.zeros((len(authors), self.settings.dim), self.settings.dtype),
            np.full(len(authors), -1, np.int64),
            np.full(len(authors), -1, np.int64),
        )
        for row, (author, as_of) in enumerate(zip(authors.tolist(), as_of_ms.tolist(), strict=True)):
            known = self._authors.get(author)
            if known is None:
                continue
            at = bisect_right(known.known_ms, as_of) - 1
            if at >= 0:
                found.vectors[row] = self._vector(known.part[at], known.place[at])
                found.segment[row], found.known_ms[row] = known.segment[at], known.known_ms[at]
            # A removed segment could be newer than one that came late.
            if known.removed_ms >= 0 and (at < 0 or known.removed_ms > known.known_ms[at]):
                raise self._removed(author, as_of, known.removed_ms)
        return found

    def mean(self, authors: np.ndarray, as_of_ms: np.ndarray) -> MeanVectors:
        """Return the mean of all vectors of each author as of a time, also of those that are no longer kept.

        Args:
            authors: ``[n]`` int64.
            as_of_ms: ``[n]`` int64.

        Raises:
            UserError: the time is before that of a removed segment, whose vector is only in a sum.
        """
        found = MeanVectors(np.zeros((len(authors), self.settings.dim), np.float32), np.zeros(len(authors), np.int64))
        for row, (author, as_of) in enumerate(zip(authors.tolist(), as_of_ms.tolist(), strict=True)):
            known = self._authors.get(author)
            if known is None:
                continue
            if as_of < known.removed_ms:
                raise self._removed(author, as_of, known.removed_ms)
            visible = bisect_right(known.known_ms, as_of)
            count = known.removed + visible
            if not count:
                continue
            total = known.sum if visible == len(known.known_ms) else None
            if total is None:
                total = known.base
                for part, place in zip(known.part[:visible], known.place[:visible], strict=True):
                    total = total + self._vector(part, place)
                if visible == len(known.known_ms):
                    known.sum = total
            found.vectors[row], found.counts[row] = total / count, count
        return found

    def write_table(self, path: str | Path) -> ContentVectors:
        """Write the kept vectors as a table by segment id, such as ``limelight embed`` makes of stored segments.

        Raises:
            UserError: the table cannot be written.
        """
        records = [
            (part, record) for part, end in zip(self._parts, self._ends, strict=True) for record in part.records(0, end)
        ]
        none = np.empty(0, np.int64)
        ids = np.concatenate([none, *(record.entries["id"] for _, record in records)])
        texts = np.concatenate([none.astype(np.uint64), *(record.entries["text"] for _, record in records)])
        settings = self.settings
        return write_parts(
            path, ids, texts, _portions(records), settings.dim, origin=settings.origin, dtype=settings.dtype
        )

    def _removed(self, author: int, as_of_ms: int, removed_ms: int) -> UserError:
        return UserError(
            f"{self._directory}: author {author} as of {as_of_ms}: segments up to {removed_ms} are not kept any more; "
            "read a later time, or keep more (follow.keep_hours)"
        )

    def _forget(self) -> None:
        self._files.close()
        self._parts: list[CachePart] = []
        self._ends: list[int] = []
        self._authors: dict[int, _Author] = {}
        self._expected: dict[int, np.ndarray] = {}
        self._sequence = 0
        self._sums_version: tuple[int, ...] | None = ()

    def _vector(self, part: int, place: int) -> np.ndarray:
        return self._expected[place] if part == _EXPECTED else self._parts[part].vector(place)

    def _author(self, author: int) -> _Author:
        """Return the segments of an author, none for a new one."""
        known = self._authors.get(author)
        if known is None:
            known = self._authors[author] = _Author(np.zeros(self.settings.dim))
        if known.sum is None and not known.known_ms:
            known.sum = known.base
        return known

    def _read_new(self, through: int) -> None:
        version = self._version_of_sums()
        if version != self._sums_version:
            self._forget()
            sums = AuthorSums.read(self._directory, self.settings.dim)
            self._sequence, self._sums_version = sums.sequence, version
            for author, count, removed_ms, total in zip(
                sums.author.tolist(), sums.count.tolist(), sums.removed_ms.tolist(), sums.sum, strict=True
            ):
                self._authors[author] = _Author(total, count, removed_ms)
        files = part_files(self._directory)
        opened = {part.path for part in self._parts}
        for number, (first, path) in enumerate(files):
            last = number + 1 == len(files)
            if first > through:
                break
            if path not in opened:
                if not last and files[number + 1][0] <= self._sequence + 1:
                    continue
                if first != self._sequence + 1:
                    # The parts between have been removed since the sums were read.
                    raise FileNotFoundError(path)
                self._parts.append(self._files.enter_context(CachePart(path, self.settings)))
                self._ends.append(0)
            elif path != self._parts[-1].path:
                continue
            self._read_part(len(self._parts) - 1, last, through)

    def _read_part(self, number: int, last: bool, through: int) -> None:
        """Read the new records of a part; the last one may end with a record that is being written."""
        part = self._parts[number]
        try:
            for record in part.records(self._ends[number]):
                if record.sequence > through:
                    break
                if record.sequence != self._sequence + 1:
                    raise DamagedRecord(f"record {record.sequence} follows record {self._sequence}", torn=False)
                self._add(number, record, part.vectors(record))
                self._sequence, self._ends[number] = record.sequence, record.end
        except DamagedRecord as error:
            if not (error.torn and last):
                raise UserError(f"{part.path}: damaged at byte {self._ends[number]:,}: {error}") from None

    def _add(self, part: int, record: CacheRecord, vectors: np.ndarray) -> None:
        places = range(record.vectors_at, record.end, self.settings.vector_bytes)
        for (segment, author, known_ms, *_), place, vector in zip(
            record.entries.tolist(), places, vectors, strict=True
        ):
            known = self._author(author)
            if self._expected.pop(segment, None) is None:
                known.add(segment, known_ms, part, place, vector)
            else:
                known.stored(segment, part, place)

    def _version_of_sums(self) -> tuple[int, ...] | None:
        try:
            found = (self._directory / AVERAGES).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _portions(records: list[tuple[CachePart, CacheRecord]]) -> Iterator[VectorPart]:
    for part, record in records:
        yield record.entries["id"], part.vectors(record)
