"""Part files of a cache of segment vectors: the layout of their records, and reading them.

A cache is a directory::

    cache.json                  format, width and type of the vectors, and their origin
    part-<sequence>.bin         records from that sequence number on

A record is a batch of segments, which is there whole or not at all: a header with lengths and CRC-32s, one ``ENTRY`` a
segment, a note in JSON, and the vectors. The note has the position of the source after the batch.
:mod:`trainer.semantic_ids.vector_cache` writes the records, and adds the vectors of removed parts to a third file.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.data.format.content_vectors import DTYPES, Origin
from trainer.runtime.files import sync, write_json
from trainer.runtime.stored_files import open_regular, parse_json_object, read_json_object, stored_value

FORMAT = 1
SETTINGS = "cache.json"

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

    def write(self, directory: Path) -> None:
        """Write the settings of a new cache.

        Raises:
            OSError: they cannot be written.
        """
        write_json(directory / SETTINGS, {"format": FORMAT, **asdict(self)})
        sync(directory)

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


def pack_record(sequence: int, entries: np.ndarray, note: bytes, vectors: np.ndarray) -> bytes:
    """Return the bytes of a record.

    Args:
        sequence: number of the record.
        entries: ``[n]`` of ``ENTRY``.
        note: JSON.
        vectors: ``[n, dim]`` in the cache's type.
    """
    content, packed = entries.tobytes() + note, np.ascontiguousarray(vectors).tobytes()
    header = HEADER.pack(MARK, len(entries), len(note), zlib.crc32(content), zlib.crc32(packed), sequence, 0)
    header = header[:-4] + struct.pack("<I", zlib.crc32(header[:-4]))
    return header + content + packed


def part_files(directory: Path) -> list[tuple[int, Path]]:
    """Return first sequence number and path of each part of a cache, in order."""
    found = ((_PART.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def part_path(directory: Path, sequence: int) -> Path:
    """Return the path of the part that begins with a record."""
    return directory / f"part-{sequence:015d}.bin"


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn a damaged record into one line that names its file."""
    try:
        yield
    except DamagedRecord as error:
        raise UserError(f"{path}: damaged: {error}; remove the cache and embed the segments again") from None
