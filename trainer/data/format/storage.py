"""Reading files of a dataset, on a local path or any URL that fsspec knows (``s3://``, ``hdfs://``, ``memory://``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is a URL and not a path of the local file system."""
    return "://" in str(path)


def join(path: str | Path, name: str) -> str:
    """``name`` inside the directory ``path``, for paths and URLs alike."""
    return f"{str(path).rstrip('/')}/{name}"


def read_bytes(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """A file, or ``size`` bytes of it from ``offset``; fewer where the file ends before.

    Raises:
        FileNotFoundError: no such file.
        UserError: a URL whose protocol is unknown or whose package is not installed.
    """
    if is_remote(path):
        filesystem, inside = open_url(str(path))
        return bytes(filesystem.cat_file(inside, start=offset, end=None if size is None else offset + size))
    handle = os.open(path, os.O_RDONLY)
    try:
        wanted = os.fstat(handle).st_size - offset if size is None else size
        data = os.pread(handle, wanted, offset)
        while len(data) < wanted and (more := os.pread(handle, wanted - len(data), offset + len(data))):
            data += more
        return data
    finally:
        os.close(handle)


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: cannot be opened ({error})") from None
