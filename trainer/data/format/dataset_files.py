"""Files of a dataset: finding, bounding and verifying them. Every reader of a dataset gets its bytes here.

``checksums.json`` beside ``dataset.json`` has the size and CRC-32 of every file (``trainer.runtime.checksums``).
Opening a dataset compares the sizes, which reads nothing. A file that is read whole is compared with its checksum then.
Histories are memory-mapped, so they are read once more at the start of a job (:meth:`Dataset.verify`). Records of the
shards have checksums of their own in the index.

A folder with a ``manifest.json`` is an embedding table (``content_vectors.py``). It can be replaced later, and has
checksums of its own, so ``checksums.json`` does not list it. Datasets of earlier versions have no ``checksums.json``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from trainer.console.errors import UserError, one_line
from trainer.data.format import storage
from trainer.runtime.checksums import (
    CHECKSUMS,
    FileChecksum,
    parse_checksums,
    size_and_crc32,
    store_checksums,
    stream_checksum,
)
from trainer.runtime.stored_files import MAX_JSON_BYTES, file_inside, is_relative_name

TABLE_MANIFEST = "manifest.json"
"""File whose folder is an embedding table."""

_FOLDERS = ("events", "rows", "history", "texts", "truth", "embeddings")
"""Folders of a dataset (``schema.py``)."""

_CORE = ("dataset.json", "history/", "rows/")
"""Files that must have a checksum, if the dataset has checksums. Others may be added by a user, such as texts."""


class DatasetFiles:
    """Files of a dataset by their name in it, such as ``history/offsets.npy``.

    Args:
        path: dataset, a local path or an fsspec URL.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._remote = storage.is_remote(path)

    @cached_property
    def checksums(self) -> dict[str, FileChecksum] | None:
        """Sizes and checksums of the files when they were written; None for a dataset of an earlier version.

        Raises:
            UserError: ``checksums.json`` is damaged or cannot be read.
        """
        try:
            file = self.locate(CHECKSUMS)
            content = storage.read_bytes(file, size=MAX_JSON_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.path}/{CHECKSUMS}: cannot be read ({one_line(error)})") from None
        if len(content) > MAX_JSON_BYTES:
            raise UserError(f"{file}: too large; such a file has at most {MAX_JSON_BYTES:,} bytes")
        return parse_checksums(content, file, self.repair)

    @property
    def repair(self) -> str:
        """Advice for the case of a damaged file."""
        return f"restore it, or record it if it was changed on purpose: limelight data verify {self.path} --record"

    def locate(self, name: str) -> str:
        """Return the path or URL of a file.

        Raises:
            UserError: the name or a link on the way leads out of the dataset.
        """
        return storage.join(self.path, name) if self._remote else str(file_inside(Path(self.path), name))

    def checksum(self, name: str) -> FileChecksum | None:
        """Return the recorded size and checksum of a file, or None if there is none to compare with.

        Raises:
            UserError: the dataset has checksums, but not of this file, which must have one.
        """
        if self.checksums is None:
            return None
        if name not in self.checksums and name.startswith(_CORE):
            raise UserError(f"{storage.join(self.path, CHECKSUMS)}: does not list {name}; {self.repair}")
        return self.checksums.get(name)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Read a whole file, and compare it with its checksum.

        Args:
            name: of the file.
            limit: largest size that such a file can have; None for any size.

        Raises:
            FileNotFoundError: there is no such file, and the dataset has no checksum of it.
            NotADirectoryError: the dataset's path is that of a file.
            UserError: it is missing, damaged, too large, not a regular file, or cannot be read.
        """
        file = self.locate(name)
        recorded = self.checksums.get(name) if self.checksums is not None else None
        limits = [size for size in (limit, None if recorded is None else recorded.bytes) if size is not None]
        try:
            data = storage.read_bytes(file, size=min(limits) + 1 if limits else None)
        except FileNotFoundError:
            if recorded is None:
                raise
            raise UserError(self._missing(name)) from None
        except NotADirectoryError:
            raise
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or one_line(error)})") from None
        if recorded is not None and len(data) != recorded.bytes:
            raise UserError(self._wrong_size(name, storage.size_of(file), recorded))
        if limit is not None and len(data) > limit:
            raise UserError(f"{file}: too large; such a file has at most {limit:,} bytes")
        recorded = self.checksum(name)
        if recorded is not None and recorded != stream_checksum(storage.as_file(data)):
            raise UserError(self._wrong_content(name))
        return data

    def verify(self, name: str, copy: Path | None = None, advance: Callable[[int], None] = lambda size: None) -> None:
        """Read a file in blocks, and compare it with its checksum; do nothing if there is none.

        Args:
            name: of the file.
            copy: local copy of the file, which is read instead.
            advance: called with the number of bytes of each block.

        Raises:
            UserError: it is missing, damaged, or not a regular file.
        """
        recorded = self.checksum(name)
        if recorded is None:
            return
        try:
            if copy is not None:
                found = size_and_crc32(copy, advance)
            elif self._remote:
                filesystem, inside = storage.open_url(self.locate(name))
                with filesystem.open(inside, "rb") as file:
                    found = stream_checksum(file, advance)
            else:
                found = size_and_crc32(Path(self.locate(name)), advance)
        except FileNotFoundError:
            raise UserError(self._missing(name)) from None
        except OSError as error:
            raise UserError(f"{storage.join(self.path, name)}: cannot be read ({one_line(error)})") from None
        if found.bytes != recorded.bytes:
            raise UserError(self._wrong_size(name, found.bytes, recorded))
        if found != recorded:
            raise UserError(self._wrong_content(name) if copy is None else self._wrong_copy(name, copy))

    def check_sizes(self, skip: Callable[[str], bool] = lambda name: False) -> None:
        """Check that every recorded file is there, is a regular file and has its size; nothing is read.

        Args:
            skip: function that says which files may be missing or damaged.

        Raises:
            UserError: the first file for which this is not so.
        """
        for _, problem in self.list_wrong_sizes(skip):
            raise UserError(problem)

    def list_wrong_sizes(self, skip: Callable[[str], bool] = lambda name: False) -> Iterator[tuple[str, str]]:
        """Yield the name and one line for every recorded file that is missing, of another size, or no regular file."""
        listed = None
        if self._remote and self.checksums:
            # One listing instead of a question for each file.
            listed = storage.list_url(self.path)
            if listed is None:
                return
        for name, recorded in (self.checksums or {}).items():
            if skip(name):
                continue
            try:
                size = self._local_size(name) if listed is None else listed[name]
            except (FileNotFoundError, NotADirectoryError, KeyError):
                yield name, self._missing(name)
            except UserError as error:
                yield name, str(error)
            except OSError as error:
                yield name, f"{storage.join(self.path, name)}: cannot be read ({one_line(error)})"
            else:
                if size != recorded.bytes:
                    yield name, self._wrong_size(name, size, recorded)

    def names(self) -> set[str]:
        """Return the names of the files that are there, without embedding tables."""
        if self._remote:
            return set(storage.list_url(self.path) or self.checksums or ())
        return set(list_files(Path(self.path)))

    def sizes(self, folder: str) -> dict[str, int] | None:
        """Return the sizes of the files in a folder by name; None if the file system of a URL cannot list it.

        Raises:
            UserError: there is no such folder, or it cannot be read.
        """
        if self._remote:
            return storage.list_url(self.locate(folder))
        try:
            with os.scandir(self.locate(folder)) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise UserError(f"{storage.join(self.path, folder)}: cannot be read ({one_line(error)})") from None

    def _local_size(self, name: str) -> int:
        """Return the size of a regular file of a local dataset."""
        path = os.path.join(self.path, name)
        # Resolving the links of a whole path costs many calls, so it is done once for each folder, and for links.
        folder = os.path.dirname(name)
        if folder not in self._folders or not is_relative_name(name):
            file_inside(Path(self.path), name)
            self._folders.add(folder)
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            found = os.stat(file_inside(Path(self.path), name))
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: not a regular file")
        return found.st_size

    @cached_property
    def _folders(self) -> set[str]:
        """Folders that are known to lie in the dataset."""
        return set()

    def _missing(self, name: str) -> str:
        return f"{storage.join(self.path, name)} is missing, but {CHECKSUMS} lists it; {self.repair}"

    def _wrong_size(self, name: str, size: int, recorded: FileChecksum) -> str:
        file = storage.join(self.path, name)
        return f"{file}: damaged, it has {size:,} bytes and had {recorded.bytes:,} when it was written; {self.repair}"

    def _wrong_content(self, name: str) -> str:
        return f"{storage.join(self.path, name)}: damaged, it has another content than was written; {self.repair}"

    def _wrong_copy(self, name: str, copy: Path) -> str:
        return (
            f"{copy}: damaged, it differs from {storage.join(self.path, name)}, whose copy it is; remove {copy.parent}"
        )


def record_checksums(directory: Path, report: Callable[[int, int], None]) -> dict[str, FileChecksum]:
    """Write ``checksums.json`` of a local dataset, atomically, and return its entries.

    Args:
        directory: of the dataset.
        report: called with the number of bytes that were read, and their total.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
        UserError: a file is not a regular file, or a link leads out of the directory.
    """
    files = {name: file_inside(directory, name) for name in list_files(directory)}
    done, total = 0, sum(path.stat().st_size for path in files.values())

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(done, total)

    checksums = {name: size_and_crc32(path, advance) for name, path in files.items()}
    store_checksums(directory, checksums)
    return checksums


def list_files(directory: Path) -> list[str]:
    """Return the names of the files of a local dataset that have a checksum, in order.

    Embedding tables, and files of others in the directory, such as notes or a run, do not belong to them.
    """
    names = []
    for folder, folders, files in os.walk(directory):
        place = Path(folder).relative_to(directory)
        if not place.parts:
            folders[:] = [name for name in folders if name in _FOLDERS]
            files = [name for name in files if name == "dataset.json" or name.endswith(".parquet")]
        elif TABLE_MANIFEST in files:
            folders.clear()
            continue
        names += [str(place / name) for name in files]
    return sorted(name for name in names if not _is_temporary(name))


def list_vector_tables(directory: Path) -> list[Path]:
    """Return the folders of the embedding tables in a local dataset."""
    return sorted(file.parent for file in directory.glob(f"*/**/{TABLE_MANIFEST}"))


def _is_temporary(name: str) -> bool:
    """True for the hidden files of a writer (``trainer.runtime.files.write_json``), which are renamed."""
    return Path(name).name.startswith(".")
