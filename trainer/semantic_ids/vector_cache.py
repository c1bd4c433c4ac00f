"""Cache of the vectors of recent segments: append-only files that one process writes and any number read.

LARM (section 3.2) puts the vector of each room into a cache every 30 seconds, and reads an author's latest vector and
long-term mean from there; see :mod:`trainer.semantic_ids.vector_cache_reader`. Beside the parts of
:mod:`trainer.semantic_ids.vector_cache_parts` a cache has::

    averages.npz                sums of the vectors of removed parts, by author

A record has vectors and the position of the source after them. So both are stored in one step, and a process that is
killed continues exactly after its last record.

:meth:`VectorCache.append` returns when the record is on disk. A record that a crash has cut short is at the end of the
last part, where the next writer removes it; readers stop before it. Any other damage is an error.

Parts are removed as a whole when all of their segments are older than ``keep_ms`` before the newest one. Before that
their vectors are added to the sums of ``averages.npz``.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.data.format.text_schema import SEGMENTS_PER_ITEM
from trainer.runtime.files import sync, whole_file, write_fully
from trainer.runtime.stored_files import load_arrays, stored_value
from trainer.semantic_ids.vector_cache_parts import (
    MAX_ENTRIES,
    SETTINGS,
    CachePart,
    CacheRecord,
    CacheSettings,
    DamagedRecord,
    damage_named,
    pack_record,
    part_files,
    part_path,
)

logger = logging.getLogger(__name__)

AVERAGES = "averages.npz"

PART_BYTES = 1 << 28
"""Size at which a new part begins."""
LATEST_SEGMENTS = 100_000
PARTS_KEPT = 24
"""Number of parts into which the kept time is divided."""


@dataclass(frozen=True)
class AuthorSums:
    """Sums of the vectors of removed parts.

    Attributes:
        sequence: last record that the sums contain, 0 if none.
        newest_ms: newest time of a removed segment, -1 if none.
        author: ``[m]`` int64, ascending.
        count: ``[m]`` int64.
        removed_ms: ``[m]`` int64, newest time of a removed segment of the author.
        sum: ``[m, dim]`` float64.
    """

    sequence: int
    newest_ms: int
    author: np.ndarray
    count: np.ndarray
    removed_ms: np.ndarray
    sum: np.ndarray

    @staticmethod
    def read(directory: Path, dim: int) -> AuthorSums:
        """Read the sums of a cache; they are empty if no part was removed yet.

        Raises:
            UserError: the file is damaged.
        """
        file = directory / AVERAGES
        none = np.empty(0, np.int64)
        try:
            arrays = load_arrays(file)
        except FileNotFoundError:
            return AuthorSums(0, -1, none, none, none, np.empty((0, dim)))
        try:
            sequence, newest_ms = (int(value) for value in arrays["through"])
            sums = AuthorSums(
                sequence, newest_ms, arrays["author"], arrays["count"], arrays["removed_ms"], arrays["sum"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: damaged ({one_line(error):.120})") from None
        length = len(sums.author)
        if sums.sum.shape != (length, dim) or sums.sum.dtype != np.float64 or not np.isfinite(sums.sum).all():
            raise UserError(f"{file}: damaged, sums of shape {sums.sum.shape} and type {sums.sum.dtype}")
        for column in (sums.author, sums.count, sums.removed_ms):
            if column.shape != (length,) or column.dtype != np.int64:
                raise UserError(f"{file}: damaged, a column of shape {column.shape} and type {column.dtype}")
        if (sums.author[1:] <= sums.author[:-1]).any() or (sums.count < 1).any():
            raise UserError(f"{file}: damaged, authors are not in order or have no segment")
        return sums

    def write(self, directory: Path) -> None:
        """Replace the file of a cache atomically.

        Raises:
            UserError: it cannot be written.
        """
        with whole_file(directory / AVERAGES) as tmp_path, open(tmp_path, "wb") as file:
            through = np.array([self.sequence, self.newest_ms], np.int64)
            np.savez(
                file,
                through=through,
                author=self.author,
                count=self.count,
                removed_ms=self.removed_ms,
                sum=self.sum,
            )
        sync(directory)

    def plus(self, part: CachePart, records: Sequence[CacheRecord]) -> AuthorSums:
        """Return the sums with the segments of further records, which are added in their order.

        The sums of all authors are copied once for all records, as there may be many of both.

        Args:
            part: file of the records.
            records: at least one, after those that the sums contain.
        """
        entries = np.concatenate([record.entries for record in records])
        author = np.union1d(self.author, entries["author"])
        old, new = np.searchsorted(author, self.author), np.searchsorted(author, entries["author"])
        count, removed_ms = np.zeros(len(author), np.int64), np.full(len(author), -1, np.int64)
        total = np.zeros((len(author), self.sum.shape[1]))
        count[old], removed_ms[old], total[old] = self.count, self.removed_ms, self.sum
        np.add.at(count, new, 1)
        np.maximum.at(removed_ms, new, entries["known_ms"])
        rows = iter(new.tolist())
        for record in records:
            # One after the other, so that the sums have the same bits however the segments are divided.
            for vector in part.vectors(record):
                total[next(rows)] += vector
        newest_ms = max(self.newest_ms, int(entries["known_ms"].max(initial=-1)))
        return AuthorSums(records[-1].sequence, newest_ms, author, count, removed_ms, total)


class VectorCache:
    """Writer of a cache; only one process may have one at a time. A context manager.

    Args:
        directory: directory of the cache; made if it is not there.
        settings: must be those of the cache if it is there.
        keep_ms: time for which segments are kept, measured from the newest one.

    Attributes:
        directory, settings, keep_ms: as given.
        sequence: number of the last record, 0 if there is none.
        position: position of the source after the last record.
        note: note of the last record, without the position.
        newest_ms: newest ``known_ms`` of a segment, -1 if there is none.

    Raises:
        UserError: the cache is damaged, has vectors of another origin, or cannot be written.
    """

    def __init__(self, directory: Path, settings: CacheSettings, keep_ms: int) -> None:
        self.directory, self.settings, self.keep_ms = directory, settings, keep_ms
        self.sequence, self.newest_ms = 0, -1
        self.position: dict[str, Any] = {}
        self.note: dict[str, Any] = {}
        self._rooms: dict[int, list[int]] = {}
        self._latest: deque[tuple[int, int]] = deque()
        self._latest_segments = 0
        self._file: BinaryIO | None = None
        self._first_ms = self._part_newest_ms = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if (directory / SETTINGS).exists():
                self._check(CacheSettings.read(directory))
            else:
                settings.write(directory)
            self._load()
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({one_line(error)})") from None

    def __enter__(self) -> VectorCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the last part."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin_with(self, sums: AuthorSums) -> None:
        """Begin the means of the authors with segments from before the first one of this cache.

        They count as segments of removed parts. A cache that has removed parts, or that began with others, keeps its
        own.

        Args:
            sums: of segments, with ``sequence`` 0.

        Raises:
            UserError: they cannot be written.
        """
        assert sums.sequence == 0
        if AuthorSums.read(self.directory, self.settings.dim).sequence == 0:
            try:
                sums.write(self.directory)
            except OSError as error:
                raise UserError(f"{self.directory / AVERAGES}: cannot be written ({one_line(error)})") from None
            self.newest_ms = max(self.newest_ms, sums.newest_ms)

    def has(self, segment_id: int) -> bool:
        """True if a segment is in the cache, or was in a record of the kept time."""
        room = self._rooms.get(segment_id // SEGMENTS_PER_ITEM)
        return room is not None and bool(room[0] >> segment_id % SEGMENTS_PER_ITEM & 1)

    def append(
        self, entries: np.ndarray, vectors: np.ndarray, position: dict[str, Any], note: dict[str, Any] | None = None
    ) -> int:
        """Write a record, and return its sequence number when it is on disk.

        Args:
            entries: ``[n]`` of ``ENTRY``, segments that the cache does not have; may be empty.
            vectors: ``[n, dim]`` in the cache's type, finite.
            position: position of the source after these segments.
            note: further values of the record, ready for JSON.

        Raises:
            UserError: it cannot be written, such as on a full disk; the cache is as before.
        """
        assert len(entries) <= MAX_ENTRIES and vectors.shape == (len(entries), self.settings.dim)
        assert vectors.dtype == self.settings.dtype
        sequence = self.sequence + 1
        if self._file is None or self._is_full(entries):
            self._begin_part(sequence)
        assert self._file is not None
        changed, whole = position, self._file.tell() == 0
        if not whole:
            # Only the first record of a part has the whole position, which may have many files.
            changed = {key: value for key, value in position.items() if self.position.get(key) != value}
            changed |= {key: None for key in self.position.keys() - position.keys()}
        document = {**(note or {}), "position": changed, "whole": whole}
        written = json.dumps(document, separators=(",", ":")).encode()
        begin = self._file.tell()
        try:
            write_fully(self._file, pack_record(sequence, entries, written, vectors))
            os.fdatasync(self._file.fileno())
        except OSError as error:
            name = self._file.name
            self._undo(begin)
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise UserError(f"{name}: a record cannot be written ({reason}); nothing of it is stored") from None
        self.sequence, self.position, self.note = sequence, dict(position), dict(note or {})
        self._count(entries)
        return sequence

    @property
    def sequence_before_latest(self) -> int:
        """Record after which the latest 100,000 segments come; 0 if the cache has fewer."""
        return self._latest[0][0] - 1 if self._latest_segments >= LATEST_SEGMENTS else 0

    def records(self, after: int) -> Iterator[tuple[CacheRecord, np.ndarray]]:
        """Yield the records after a sequence number, and their vectors.

        Raises:
            UserError: a record is damaged.
        """
        files = part_files(self.directory)
        for number, (_, path) in enumerate(files):
            if number + 1 < len(files) and files[number + 1][0] <= after + 1:
                continue
            with CachePart(path, self.settings) as part, damage_named(path):
                for record in part.records():
                    if record.sequence > after:
                        yield record, part.vectors(record)

    def _check(self, found: CacheSettings) -> None:
        """Compare the settings with those of the cache."""
        for name in ("dim", "dtype"):
            if getattr(found, name) != getattr(self.settings, name):
                raise UserError(
                    f"{self.directory}: has vectors with {name} = {getattr(found, name)}, these have "
                    f"{getattr(self.settings, name)}; name another embed.directory"
                )
        if found.origin.hash != self.settings.origin.hash:
            raise UserError(
                f"{self.directory}: has vectors of another model, adapter, template or pooling (model "
                f"{found.origin.model!r}, adapter {found.origin.adapter!r}); name another embed.directory, or use what "
                "it was made with"
            )

    def _load(self) -> None:
        """Read what the cache has, and cut off a record that a crash has left unfinished."""
        sums = AuthorSums.read(self.directory, self.settings.dim)
        self.sequence, self.newest_ms = sums.sequence, sums.newest_ms
        files = part_files(self.directory)
        for number, (first, path) in enumerate(files):
            last = number + 1 == len(files)
            if not last and files[number + 1][0] <= sums.sequence + 1:
                # A writer was killed after it had added this part to the sums, and before it removed it.
                path.unlink()
                continue
            if first != self.sequence + 1:
                raise UserError(
                    f"{path}: records {self.sequence + 1} to {first - 1} are missing before it; the cache is damaged"
                )
            end = 0
            self._first_ms = self._part_newest_ms = -1
            with CachePart(path, self.settings) as part:
                try:
                    for record in part.records(check_vectors=last):
                        self._take(record, path)
                        end = record.end
                except DamagedRecord as error:
                    if not (error.torn and last):
                        raise UserError(f"{path}: damaged at byte {end:,}: {error}") from None
                    logger.info(f"{path}: {error}; its last {path.stat().st_size - end:,} bytes are removed")
            if last:
                self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
                self._undo(end)

    def _take(self, record: CacheRecord, path: Path) -> None:
        """Count a record that was read."""
        if record.sequence != self.sequence + 1:
            raise UserError(f"{path}: record {record.sequence} follows record {self.sequence}; the cache is damaged")
        note = dict(record.note)
        changed, whole = stored_value(note, path, "position", dict), stored_value(note, path, "whole", bool)
        del note["position"], note["whole"]
        self.sequence, self.note = record.sequence, note
        before = {} if whole else self.position
        self.position = {key: value for key, value in {**before, **changed}.items() if value is not None}
        self._count(record.entries)

    def _count(self, entries: np.ndarray) -> None:
        if not len(entries):
            return
        self._latest.append((self.sequence, len(entries)))
        self._latest_segments += len(entries)
        while self._latest_segments - self._latest[0][1] >= LATEST_SEGMENTS:
            self._latest_segments -= self._latest.popleft()[1]
        self.newest_ms = max(self.newest_ms, int(entries["known_ms"].max()))
        self._part_newest_ms = max(self._part_newest_ms, int(entries["known_ms"].max()))
        if self._first_ms < 0:
            self._first_ms = int(entries["known_ms"].min())
        for segment_id, known_ms in zip(entries["id"].tolist(), entries["known_ms"].tolist(), strict=True):
            # A room's segments are the bits of one number: a day of them has 360 bytes.
            room = self._rooms.setdefault(segment_id // SEGMENTS_PER_ITEM, [0, known_ms])
            room[0] |= 1 << segment_id % SEGMENTS_PER_ITEM
            room[1] = max(room[1], known_ms)

    def _is_full(self, entries: np.ndarray) -> bool:
        """True if a new part begins with these segments."""
        assert self._file is not None
        if self._file.tell() >= PART_BYTES:
            return True
        if not len(entries) or self._first_ms < 0:
            return False
        return int(entries["known_ms"].max()) - self._first_ms > self.keep_ms // PARTS_KEPT

    def _begin_part(self, sequence: int) -> None:
        """Begin a new part, and remove the parts that are too old."""
        path = part_path(self.directory, sequence)
        try:
            self.close()
            self._remove_old()
            self._file = open(path, "w+b", buffering=0)  # noqa: SIM115
            sync(self.directory)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({one_line(error)})") from None
        self._first_ms = self._part_newest_ms = -1

    def _remove_old(self) -> None:
        """Add the oldest parts to the sums and remove them, as long as all of their segments are too old."""
        oldest_ms = self.newest_ms - self.keep_ms
        files = part_files(self.directory)
        sums = before = AuthorSums.read(self.directory, self.settings.dim)
        removed = []
        # The last part stays: it has the position.
        for _, path in files[:-1]:
            with CachePart(path, self.settings) as part, damage_named(path):
                records = list(part.records())
                if any(
                    len(record.entries) and int(record.entries["known_ms"].max()) >= oldest_ms for record in records
                ):
                    break
                new = [record for record in records if record.sequence > sums.sequence]
                if new:
                    sums = sums.plus(part, new)
            removed.append(path)
        if sums is not before:
            sums.write(self.directory)
        for path in removed:
            path.unlink()
        self._rooms = {item: room for item, room in self._rooms.items() if room[1] >= oldest_ms}

    def _undo(self, place: int) -> None:
        """Cut the last part off at a place."""
        assert self._file is not None
        self._file.seek(place)
        self._file.truncate()
