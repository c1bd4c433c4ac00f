"""Cache of the vectors of recent segments: append-only files that one process writes and any number read.

LARM (section 3.2) puts the vector of each room into a cache every 30 seconds, and reads an author's latest vector and
long-term mean from there; see :mod:`trainer.semantic_ids.vector_cache_reader`. A cache is a directory::

    cache.json                  format, width and type of the vectors, and their origin
    part-<sequence>.bin         records from that sequence number on
    averages.npz                sums of the vectors of removed parts, by author

A record is a batch of segments, which is there whole or not at all: a header with lengths and CRC-32s, one ``ENTRY`` a
segment, a note in JSON, and the vectors. The note has the position of the source after the batch. So vectors and
position are stored in one step, and a process that is killed continues exactly after its last record.

:meth:`VectorCache.append` returns when the record is on disk. A record that a crash has cut short is at the end of the
last part, where the next writer removes it; readers stop before it. Any other damage is an error.

Parts are removed as a whole when all of their segments are older than ``keep_ms`` before the newest one. Before that
their vectors are added to the sums of ``averages.npz``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.data.format.content_vectors import DTYPES, Origin
from trainer.data.format.text_schema import SEGMENTS_PER_ITEM
from trainer.runtime.files import sync, whole_file, write_fully, write_json
from trainer.runtime.stored_files import (
    load_arrays,
    open_regular,
    parse_json_object,
    read_json_object,
    stored_value,
)

logger = logging.getLogger(__name__)

FORMAT = 1
SETTINGS = "cache.json"
AVERAGES = "averages.npz"

ENTRY = np.dtype(
    [("id", "<i8"), ("author", "<i8"), ("known_ms", "<i8"), ("text", "<u8"), ("code", "<i4"), ("spare", "<i4")]
)
"""One segment: ``id`` is that of ``text_schema.segment_ids``, ``text`` a hash, ``code`` -1 if there is no codebook."""

HEADER = struct.Struct("<8sIIIIQI")
"""Mark, entries, bytes of the note, CRC-32 of entries and note, CRC-32 of the vectors, sequence, CRC-32 of the rest."""
MARK = b"LLVECS01"

MAX_ENTRIES = 1 << 20
MAX_NOTE_BYTES = 1 << 26
MAX_DIM = 1 << 16
PART_BYTES = 1 << 28
"""Size at which a new part begins."""
LATEST_SEGMENTS = 100_000
PARTS_KEPT = 24
"""Number of parts into which the kept time is divided."""

_PART = re.compile(r"part-(\d{15})\.bin")


@dataclass(frozen=True)
class CacheSettings:
    """Settings of a cache.

    Attributes:
        dim: number of elements of a vector.
        dtype: type of the stored vectors, ``float16`` or ``float32``.
        origin: origin of the vectors; its hash must be the same for all of them.
    """

    dim: int
    dtype: str
    origin: Origin

    @staticmethod
    def read(directory: Path) -> CacheSettings:
        """Read the settings of a cache.

        Raises:
            UserError: there is no cache, it is of another release, or its settings are damaged.
        """
        file = directory / SETTINGS
        try:
            document = read_json_object(file)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{directory}: no cache of segment vectors here ({SETTINGS} is missing); `limelight embed --follow` "
                "makes one"
            ) from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
        if document.get("format") != FORMAT:
            raise UserError(f"{file}: format is {document.get('format')}; this release reads format {FORMAT}")
        dim, dtype = stored_value(document, file, "dim", int), stored_value(document, file, "dtype", str)
        if not 0 < dim <= MAX_DIM or dtype not in DTYPES:
            raise UserError(f"{file}: damaged, vectors of {dim} elements of type {dtype!a:.20}")
        try:
            origin = Origin(**stored_value(document, file, "origin", dict))
        except TypeError as error:
            raise UserError(f"{file}: damaged ({one_line(error):.120})") from None
        return CacheSettings(dim, dtype, origin)

    @property
    def vector_bytes(self) -> int:
        """Number of bytes of a stored vector."""
        return self.dim * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class CacheRecord:
    """Record of a part.

    Attributes:
        sequence: number of the record, from 1 without gaps.
        entries: ``[n]`` of ``ENTRY``.
        note: position of the source, and what else the writer has stored.
        vectors_at: place of the vectors in the file.
        end: place after the record.
        vectors_crc: CRC-32 of the vectors.
        last: True if it ended at the end of the file when it was read.
    """

    sequence: int
    entries: np.ndarray
    note: dict[str, Any]
    vectors_at: int
    end: int
    vectors_crc: int
    last: bool


class DamagedRecord(Exception):
    """A record is not whole.

    Attributes:
        torn: True if it is what a crash leaves at the end of a file.
    """

    def __init__(self, reason: str, *, torn: bool) -> None:
        super().__init__(reason)
        self.torn = torn


class CachePart:
    """File of records, opened for reading. A context manager.

    Args:
        path: the file.
        settings: settings of the cache.

    Raises:
        FileNotFoundError: the file has been removed.
        UserError: it cannot be opened.
    """

    def __init__(self, path: Path, settings: CacheSettings) -> None:
        self.path, self._settings = path, settings
        try:
            self._file = open_regular(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None

    def __enter__(self) -> CachePart:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def records(self, start: int = 0, stop: int | None = None, *, check_vectors: bool = False) -> Iterator[CacheRecord]:
        """Yield the whole records from a place on.

        Args:
            start: place of the first record.
            stop: place after the last record; None for the end of the file.
            check_vectors: compare the vectors with their CRC-32.

        Raises:
            DamagedRecord: a record is not whole.
        """
        size = os.fstat(self._file.fileno()).st_size if stop is None else stop
        while start < size:
            record = self._record(start, size)
            if check_vectors:
                self.vectors(record)
            yield record
            start = record.end

    def vectors(self, record: CacheRecord) -> np.ndarray:
        """Return the vectors of a record ``[n, dim]``, compared with their CRC-32.

        Raises:
            DamagedRecord: they differ.
        """
        content = self._read(record.vectors_at, record.end - record.vectors_at)
        if zlib.crc32(content) != record.vectors_crc:
            raise DamagedRecord("vectors differ from their checksum", torn=record.last)
        return np.frombuffer(content, np.dtype(self._settings.dtype).newbyteorder("<")).reshape(-1, self._settings.dim)

    def vector(self, place: int) -> np.ndarray:
        """Return the vector ``[dim]`` at a place in the file."""
        content = self._read(place, self._settings.vector_bytes)
        return np.frombuffer(content, np.dtype(self._settings.dtype).newbyteorder("<"))

    def _record(self, start: int, size: int) -> CacheRecord:
        header = self._read(start, min(HEADER.size, size - start))
        if len(header) < HEADER.size:
            raise DamagedRecord("a header is cut short", torn=True)
        mark, count, note_bytes, crc, vectors_crc, sequence, header_crc = HEADER.unpack(header)
        if mark != MARK or zlib.crc32(header[:-4]) != header_crc or count > MAX_ENTRIES or note_bytes > MAX_NOTE_BYTES:
            # After a power failure, the size of a file may be stored and its last blocks may be not.
            behind = self._read(start + HEADER.size, size - start - HEADER.size)
            raise DamagedRecord("no record begins here", torn=not any(behind))
        entries_at = start + HEADER.size
        vectors_at = entries_at + count * ENTRY.itemsize + note_bytes
        end = vectors_at + count * self._settings.vector_bytes
        if end > size:
            raise DamagedRecord("a record is cut short", torn=True)
        content = self._read(entries_at, vectors_at - entries_at)
        if zlib.crc32(content) != crc:
            raise DamagedRecord("a record differs from its checksum", torn=end == size)
        entries = np.frombuffer(content[: count * ENTRY.itemsize], ENTRY)
        note = parse_json_object(content[count * ENTRY.itemsize :], self.path)
        return CacheRecord(sequence, entries, note, vectors_at, end, vectors_crc, end == size)

    def _read(self, place: int, size: int) -> bytes:
        try:
            content = os.pread(self._file.fileno(), size, place)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({one_line(error)})") from None
        if len(content) < size:
            raise UserError(f"{self.path}: has become shorter while it was read")
        return content


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


def part_files(directory: Path) -> list[tuple[int, Path]]:
    """Return first sequence number and path of each part of a cache, in order."""
    found = ((_PART.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


class VectorCache:
    """Writer of a cache; only one process may have one at a time. A context manager.

    Args:
        directory: directory of the cache; made if it is not there.
        settings: must be those of the cache if it is there.
        keep_ms: time for which segments are kept, measured from the newest one.

    Attributes:
        settings: as given.
        sequence: number of the last record, 0 if there is none.
        position: position of the source after the last record.
        note: note of the last record, without the position.
        newest_ms: newest ``known_ms`` of a segment, -1 if there is none.

    Raises:
        UserError: the cache is damaged, has vectors of another origin, or cannot be written.
    """

    def __init__(self, directory: Path, settings: CacheSettings, keep_ms: int) -> None:
        self._directory, self.settings, self._keep_ms = directory, settings, keep_ms
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
                write_json(directory / SETTINGS, {"format": FORMAT, **asdict(settings)})
                sync(directory)
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
        content, packed = entries.tobytes() + written, np.ascontiguousarray(vectors).tobytes()
        header = HEADER.pack(MARK, len(entries), len(written), zlib.crc32(content), zlib.crc32(packed), sequence, 0)
        header = header[:-4] + struct.pack("<I", zlib.crc32(header[:-4]))
        begin = self._file.tell()
        try:
            write_fully(self._file, header + content + packed)
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
        files = part_files(self._directory)
        for number, (_, path) in enumerate(files):
            if number + 1 < len(files) and files[number + 1][0] <= after + 1:
                continue
            with CachePart(path, self.settings) as part, _damage_named(path):
                for record in part.records():
                    if record.sequence > after:
                        yield record, part.vectors(record)

    def _check(self, found: CacheSettings) -> None:
        """Compare the settings with those of the cache."""
        for name in ("dim", "dtype"):
            if getattr(found, name) != getattr(self.settings, name):
                raise UserError(
                    f"{self._directory}: has vectors with {name} = {getattr(found, name)}, these have "
                    f"{getattr(self.settings, name)}; name another embed.directory"
                )
        if found.origin.hash != self.settings.origin.hash:
            raise UserError(
                f"{self._directory}: has vectors of another model, adapter, template or pooling (model "
                f"{found.origin.model!r}, adapter {found.origin.adapter!r}); name another embed.directory, or use what "
                "it was made with"
            )

    def _load(self) -> None:
        """Read what the cache has, and cut off a record that a crash has left unfinished."""
        sums = AuthorSums.read(self._directory, self.settings.dim)
        self.sequence, self.newest_ms = sums.sequence, sums.newest_ms
        files = part_files(self._directory)
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
        return int(entries["known_ms"].max()) - self._first_ms > self._keep_ms // PARTS_KEPT

    def _begin_part(self, sequence: int) -> None:
        """Begin a new part, and remove the parts that are too old."""
        path = self._directory / f"part-{sequence:015d}.bin"
        try:
            self.close()
            self._remove_old()
            self._file = open(path, "w+b", buffering=0)  # noqa: SIM115
            sync(self._directory)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({one_line(error)})") from None
        self._first_ms = self._part_newest_ms = -1

    def _remove_old(self) -> None:
        """Add the oldest parts to the sums and remove them, as long as all of their segments are too old."""
        oldest_ms = self.newest_ms - self._keep_ms
        files = part_files(self._directory)
        sums = before = AuthorSums.read(self._directory, self.settings.dim)
        removed = []
        # The last part stays: it has the position.
        for _, path in files[:-1]:
            with CachePart(path, self.settings) as part, _damage_named(path):
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
            sums.write(self._directory)
        for path in removed:
            path.unlink()
        self._rooms = {item: room for item, room in self._rooms.items() if room[1] >= oldest_ms}

    def _undo(self, place: int) -> None:
        """Cut the last part off at a place."""
        assert self._file is not None
        self._file.seek(place)
        self._file.truncate()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn a damaged record into one line that names its file."""
    try:
        yield
    except DamagedRecord as error:
        raise UserError(f"{path}: damaged: {error}; remove the cache and embed the segments again") from None
