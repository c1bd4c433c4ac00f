"""Sizes and checksums of the files of a directory, in a manifest beside them.

``checksums.json`` has the size and CRC-32 of every file of a dataset, of an export, of fitted features, or of a
finished run, and of itself. It is written last, and verified when the directory is opened. Datasets can be large or on
a URL; ``trainer/data/format/dataset_files.py`` verifies their files. A directory of an earlier version has none; it is
opened with a line in the log.

A verification reads every byte once, in blocks. It takes about as long as reading the files from disk: CRC-32 needs
half a second of processor time per GB (measured on a file of 1 GB in the page cache, on one core of an AMD EPYC, with
zlib of Python 3.11).
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trainer.console.errors import UserError, one_line
from trainer.runtime.files import write_json
from trainer.runtime.stored_files import file_inside, open_regular, parse_json_object, read_limited

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"

_CHUNK_BYTES = 4 << 20

REPAIR = f"restore it, or remove {CHECKSUMS} if it was changed on purpose"


class FileChecksum(NamedTuple):
    """Size and CRC-32 of a file when it was written."""

    bytes: int
    crc32: int


def size_and_crc32(path: Path, advance: Callable[[int], None] = lambda size: None) -> FileChecksum:
    """Return the size and CRC-32 of a file, which is read in blocks.

    Args:
        path: the file.
        advance: called with the number of bytes of each block.

    Raises:
        OSError: it cannot be read.
        UserError: it is not a regular file.
    """
    with open_regular(path) as file:
        return stream_checksum(file, advance)


def stream_checksum(file: BinaryIO, advance: Callable[[int], None] = lambda size: None) -> FileChecksum:
    """Return the size and CRC-32 of the rest of an open file, which is read in blocks."""
    size = crc = 0
    while chunk := file.read(_CHUNK_BYTES):
        size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        advance(len(chunk))
    return FileChecksum(size, crc)


def write_checksums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Write the manifest of a directory's files, atomically.

    Args:
        directory: of the files.
        names: paths below it; all files by default.
    """
    if names is None:
        files = (path for path in directory.rglob("*") if path.is_file() and path != directory / CHECKSUMS)
        names = [str(path.relative_to(directory)) for path in files]
    store_checksums(directory, {name: size_and_crc32(directory / name) for name in names})


def store_checksums(directory: Path, checksums: Mapping[str, FileChecksum]) -> None:
    """Write the manifest of a directory from known sizes and checksums of its files, atomically."""
    entries = {name: checksums[name]._asdict() for name in sorted(checksums)}
    write_json(directory / CHECKSUMS, {"files": entries, "crc32": _crc_of(entries)})


def parse_checksums(content: bytes, name: str | Path, repair: str = REPAIR) -> dict[str, FileChecksum]:
    """Return the sizes and checksums of a manifest by file.

    Args:
        content: of the manifest.
        name: of the manifest, for messages.
        repair: advice for the case of damage.

    Raises:
        UserError: the manifest is damaged.
    """
    manifest = parse_json_object(content, name)
    entries = manifest.get("files")
    if not isinstance(entries, dict) or manifest.get("crc32") != _crc_of(entries):
        raise UserError(f"{name}: damaged (its checksum does not match); {repair}")
    checksums = {}
    for file, entry in entries.items():
        numbers = [entry.get(field) for field in FileChecksum._fields] if isinstance(entry, dict) else []
        if not numbers or any(type(number) is not int or number < 0 for number in numbers):
            raise UserError(f"{name}: damaged (no size and checksum of {file!a:.120}); {repair}")
        checksums[file] = FileChecksum(entry["bytes"], entry["crc32"])
    return checksums


def verify_checksums(directory: Path, needed: Iterable[str] = (), *, repair: str = REPAIR) -> None:
    """Read every file that the manifest of a directory lists, and compare it.

    Args:
        directory: of the files.
        needed: names that the manifest must list if the files exist, since the caller reads them.
        repair: advice for the case of a damaged file.

    Raises:
        UserError: a file is missing or damaged, or the manifest is damaged or names a file elsewhere.
    """
    manifest = directory / CHECKSUMS
    try:
        entries = parse_checksums(read_limited(manifest), manifest, repair)
    except FileNotFoundError:
        logger.info(
            f"{directory}: not verified, it has no {CHECKSUMS} (an earlier version or another program wrote it)"
        )
        return
    except OSError as error:
        raise UserError(f"{manifest}: cannot be read ({one_line(error)})") from None
    for name, entry in entries.items():
        _verify(directory, name, entry, repair)
    for name in needed:
        if name not in entries and (directory / name).exists():
            raise UserError(f"{manifest}: does not list {name}, which is there; {repair}")


def _verify(directory: Path, name: str, entry: FileChecksum, repair: str) -> None:
    path = file_inside(directory, name)
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
        if entry.bytes != size:
            raise UserError(f"{path}: damaged, it has {size:,} bytes; {repair}")
        if entry.crc32 != size_and_crc32(path).crc32:
            raise UserError(f"{path}: damaged, it has another content than was written; {repair}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, but {CHECKSUMS} lists it; {repair}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


def _crc_of(entries: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
