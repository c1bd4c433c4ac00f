"""Source of segments: growing files of JSON lines, which other processes append to.

A folder's files ``*.jsonl`` are read side by side, so several processes can write, each into files of its own. The
position has the place after the last line of each file, and a checksum of the file's beginning: a file that was
replaced or emptied is read again from its beginning. A line without its line break is not read yet.
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.console.errors import UserError, one_line
from trainer.runtime.stored_files import open_regular
from trainer.semantic_ids.segment_source import Clock, LiveSegment, RejectedMessage, SourceBatch, parse_segment

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
MAX_LINE_BYTES = 1 << 20
"""Longest line that is read; the rest of a longer one is skipped."""
READ_CHUNK = 1 << 18
HELD_BYTES = 1 << 26
"""Bytes that were read ahead of their turn, of all files together: with many files each reads less at a time."""
SMALLEST_READ = 1 << 12
HEAD_BYTES = 1024
KEPT_BYTES = 1 << 16
"""Bytes of a longer line that are kept with its reason."""
POLL_SECONDS = 0.1


class LineSource:
    """Source of the lines of a file, or of the files of a folder.

    Args:
        path: file or folder.
        position: position to start from: name of a file -> ``[place, checksum of its beginning]``.
        clock: clock.
        until_end: True to end when all lines have been read that are there.

    Raises:
        UserError: there is nothing at ``path``.
    """

    def __init__(self, path: Path, position: Mapping[str, Any], clock: Clock, *, until_end: bool = False) -> None:
        if not path.exists():
            raise UserError(f"follow.path = {str(path)!r}: no such file or folder; make it before it is followed")
        self._path, self._clock, self._until_end = path, clock, until_end
        self._files: dict[str, _GrowingFile] = {}
        for name, entry in position.items():
            place, checksum = (int(value) for value in entry)
            self._files[name] = _GrowingFile(self._path_of(name), place, checksum)
        self._turn = 0
        self.finished = False

    def take(self, limit: int, timeout: float) -> SourceBatch:
        """Return the next lines; see :class:`trainer.semantic_ids.segment_source.SegmentSource`."""
        until = self._clock.monotonic() + timeout
        while True:
            batch = self._read(limit)
            left = until - self._clock.monotonic()
            if batch or self.finished or left <= 0:
                return batch
            self._clock.sleep(min(POLL_SECONDS, left))

    def close(self) -> None:
        """Nothing to release: no file stays open."""

    def _read(self, limit: int) -> SourceBatch:
        names = self._names()
        for gone in self._files.keys() - set(names):
            del self._files[gone]
        batch = SourceBatch({})
        now_ms = round(self._clock.time() * 1000)
        # Each file gets a share and its turn, so that a long file does not keep the rooms of the others waiting.
        share = max(1, limit // max(1, len(names)))
        chunk = min(READ_CHUNK, max(SMALLEST_READ, HELD_BYTES // max(1, len(names))))
        while True:
            before, found = len(batch.segments), 0
            for step in range(len(names)):
                name = names[(self._turn + step) % len(names)]
                if len(batch.segments) >= limit:
                    self._turn = (self._turn + step) % len(names)
                    break
                file = self._files.setdefault(name, _GrowingFile(self._path_of(name), 0, 0))
                most = min(share, limit - len(batch.segments))
                for content, place in file.lines(most, chunk, rest=self._until_end):
                    found += 1
                    _add(batch, content, now_ms, f"{name}:{place}")
            if not found or (len(batch.segments) == before and len(batch.rejected) >= limit):
                break
            if len(batch.segments) >= limit:
                break
        self.finished = self._until_end and not batch
        batch.position = {name: file.position for name, file in self._files.items() if file.place}
        return batch

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._path) if name.endswith(SUFFIX))
        except NotADirectoryError:
            return [self._path.name]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({one_line(error)})") from None

    def _path_of(self, name: str) -> Path:
        return self._path / name if self._path.is_dir() else self._path


class _GrowingFile:
    """File that grows.

    Args:
        path: the file.
        place: place of the first byte that was not read yet.
        checksum: of the beginning up to ``place``, see :attr:`position`.
    """

    def __init__(self, path: Path, place: int, checksum: int) -> None:
        self.place = place
        self._path, self._checksum = path, checksum
        self._inode = -1
        self._held = b""
        self._searched = 0

    @property
    def position(self) -> list[int]:
        """Place, and the CRC-32 of at most 1024 bytes before it from the beginning of the file."""
        return [self.place, self._checksum]

    def lines(self, limit: int, chunk: int, *, rest: bool) -> list[tuple[bytes, int]]:
        """Return the next lines that are not blank, and the place of each.

        Args:
            limit: largest number of lines.
            chunk: bytes to read at a time.
            rest: True to return the text after the last line break, too.
        """
        try:
            status = self._path.stat()
            unchanged = (status.st_ino, status.st_size) == (self._inode, self.place + len(self._held))
            if unchanged and self._searched == len(self._held) and not (rest and self._held):
                return []
            with open_regular(self._path) as file:
                self._check_identity(file)
                found = self._lines(file, limit, chunk, rest)
                self._checksum = self._checksum_of(file)
        except FileNotFoundError:
            return []
        except OSError as error:
            if error.errno == errno.EISDIR:
                return []
            raise UserError(f"{self._path}: cannot be read ({one_line(error)})") from None
        return found

    def _lines(self, file: BinaryIO, limit: int, chunk: int, rest: bool) -> list[tuple[bytes, int]]:
        found: list[tuple[bytes, int]] = []
        while len(found) < limit:
            end = self._held.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._held)
                file.seek(self.place + len(self._held))
                if self._searched > MAX_LINE_BYTES:
                    if not self._skip_long_line(file, found, rest):
                        break
                    continue
                portion = file.read(chunk)
                if portion:
                    self._held += portion
                    continue
                if not rest or not self._held:
                    break
                end = len(self._held)
            line, place = self._held[:end], self.place
            step = min(end + 1, len(self._held))
            self._held, self._searched = self._held[step:], 0
            self.place += step
            if line.strip():
                found.append((line, place))
        return found

    def _skip_long_line(self, file: BinaryIO, found: list[tuple[bytes, int]], rest: bool) -> bool:
        """Pass over a line that is too long, and return its beginning; False if its end is not there yet."""
        size = len(self._held)
        while portion := file.read(READ_CHUNK):
            end = portion.find(b"\n")
            size += len(portion) if end < 0 else end + 1
            if end >= 0:
                break
        else:
            if not rest:
                return False
        # One byte more than is accepted marks it as too long.
        found.append((self._held[: MAX_LINE_BYTES + 1], self.place))
        self.place += size
        self._held, self._searched = b"", 0
        return True

    def _check_identity(self, file: BinaryIO) -> None:
        """Begin again if the file at this path is another one than before, or has been emptied."""
        status = os.fstat(file.fileno())
        if status.st_size < self.place or self._checksum_of(file) != self._checksum:
            logger.info(f"follow: {self._path}: replaced or emptied since it was read; it is read from its beginning")
            self.place, self._checksum = 0, 0
        elif status.st_ino == self._inode and status.st_size >= self.place + len(self._held):
            return
        self._held, self._searched = b"", 0
        self._inode = status.st_ino

    def _checksum_of(self, file: BinaryIO) -> int:
        file.seek(0)
        return zlib.crc32(file.read(min(self.place, HEAD_BYTES)))


def _add(batch: SourceBatch, content: bytes, now_ms: int, place: str) -> None:
    if len(content) > MAX_LINE_BYTES:
        reason = f"longer than {MAX_LINE_BYTES:,} bytes"
        batch.rejected.append(RejectedMessage(place, reason, content[:KEPT_BYTES]))
        return
    parsed = parse_segment(content, now_ms, place)
    if isinstance(parsed, LiveSegment):
        batch.segments.append(parsed)
    else:
        batch.rejected.append(parsed)
