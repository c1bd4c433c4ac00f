"""Reads files of a dataset from a local path or from any URL that fsspec supports (``s3://``, ``hdfs://``, ...)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from trainer.console.errors import UserError
from trainer.runtime.stored_files import open_regular


def is_remote(path: str | Path) -> bool:
    """True if ``path`` is a URL, not a path of the local file system."""
    return "://" in str(path)


def join(path: str | Path, name: str) -> str:
    """Return the path of ``name`` in the directory ``path``, which is a local path or a URL."""
    return f"{str(path).rstrip('/')}/{name}"


def read_bytes(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """Read a whole file, or ``size`` bytes from ``offset`` on. Returns fewer bytes if the file ends earlier.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the protocol of the URL is unknown, or its package is not installed; or the path is a FIFO or a
            device.
    """
    if is_remote(path):
        filesystem, inside = open_url(str(path))
        return bytes(filesystem.cat_file(inside, start=offset, end=None if size is None else offset + size))
    with open_regular(Path(path)) as file:
        handle = file.fileno()
        rest = max(0, os.fstat(handle).st_size - offset)
        # No more than the file has: a damaged index may ask for any number of bytes.
        wanted = rest if size is None else min(size, rest)
        # The kernel may return fewer bytes than asked for, at most 2 GiB in one call.
        data = os.pread(handle, wanted, offset)
        while len(data) < wanted and (more := os.pread(handle, wanted - len(data), offset + len(data))):
            data += more
        return data


def size_of(path: str | Path) -> int:
    """Return the size of a file in bytes."""
    if is_remote(path):
        filesystem, inside = open_url(str(path))
        return int(filesystem.size(inside))
    return os.stat(path).st_size


def list_url(url: str) -> dict[str, int] | None:
    """Return the sizes of all files below a URL by their path from there; None if its file system cannot list them."""
    filesystem, inside = open_url(url)
    try:
        found = filesystem.find(inside, detail=True)
    except NotImplementedError:
        return None
    start = len(inside.rstrip("/")) + 1
    return {name[start:]: int(entry["size"]) for name, entry in found.items()}


def as_file(data: bytes) -> BinaryIO:
    """Return bytes in memory as an open file."""
    return io.BytesIO(data)


def open_url(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in that file system.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: cannot be opened ({error})") from None
