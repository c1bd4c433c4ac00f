"""Access to files that were stored earlier: regular files only, inside of their directory, and of bounded size.

A run, an export or a dataset may come from someone else, and its files name other files. These functions refuse a name
that leads elsewhere, and a file that would block the reader (a FIFO) or fill its memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import numpy as np

from trainer.console.errors import UserError, one_line

Value = TypeVar("Value")

MAX_JSON_BYTES = 1 << 28
"""Largest JSON file that is read; the manifest of a checkpoint of 10,000 ranks has about 10 MB."""

MAX_SETTINGS_BYTES = 1 << 22
"""Largest text file of settings that is read: a job file, a mapping, a template, DeepSpeed's settings."""

_MAX_NAME = 1024


def file_inside(directory: Path, name: object) -> Path:
    """Return the path of a file that a manifest or index in ``directory`` names.

    Raises:
        UserError: the name is not a relative path below the directory, or a link on the way leads out of it.
    """
    if not is_relative_name(name):
        raise UserError(
            f"{directory}: names a file {name!a:.120}; a name must be a relative path in this directory, without '..'"
        )
    assert isinstance(name, str)
    path = directory / name
    home = os.path.realpath(directory)
    if os.path.commonpath([home, os.path.realpath(path)]) != home:
        raise UserError(f"{path}: a link that leads out of {directory}; put the file itself there")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting for the writer of a FIFO.

    Raises:
        OSError: the file cannot be opened.
        UserError: it is a FIFO, a device or a socket.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UserError(f"{path}: not a regular file but a socket or a device") from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: not a regular file but {_kind_of(mode)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a regular file, or it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{path}: has {size:,} bytes; such a file has at most {limit:,}")
        content = file.read(limit + 1)
        # A file of /proc has a size of 0, and a file may grow.
        if len(content) > limit:
            raise UserError(f"{path}: has more than {limit:,} bytes; such a file has at most {limit:,}")
        return content


def read_settings(path: Path) -> str:
    """Read a UTF-8 text file of settings, of at most 4 MiB; line ends become ``\\n``.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8 text.
        UserError: it is not a regular file, or it is too large.
    """
    text = read_limited(path, MAX_SETTINGS_BYTES).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file with one object, of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a regular file, it is too large, or its content is not a JSON object.
    """
    return parse_json_object(read_limited(path, limit), path)


def stored_value(document: dict[str, Any], file: Path, key: str, kind: type[Value]) -> Value:
    """Return a value of a JSON object that we have written.

    Raises:
        UserError: the key is missing, or its value has another type; ``file`` is damaged.
    """
    value = document.get(key)
    if not isinstance(value, kind):
        raise UserError(f"{file}: damaged, {key!r} should be a {kind.__name__}, and is {value!a:.80}")
    return value


def parse_json_object(content: bytes, name: str | Path) -> dict[str, Any]:
    """Return the object of a JSON text.

    Raises:
        UserError: the content is not a JSON object, or a number is too large; ``name`` stands for the file.
    """
    try:
        value = json.loads(content, parse_float=_finite, parse_int=_whole)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{name}: not valid JSON ({one_line(error):.120})") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: damaged, a JSON object is expected, this is a {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    """Return a number of a JSON file; Python would read 1e999 as infinity, which we never write so."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text:.20} is too large")
    return number


def _whole(text: str) -> int:
    """Return a whole number of a JSON file; one of more digits than any float has cannot be computed with."""
    if len(text) > sys.float_info.max_10_exp:
        raise ValueError(f"the number {text:.20} is too large")
    return int(text)


def load_array(file: Path, ndim: int, dtype: np.dtype | None = None) -> np.ndarray:
    """Read a ``.npy`` file of numbers with ``ndim`` dimensions, as a read-only memory map.

    Args:
        file: to read.
        ndim: number of dimensions that it must have.
        dtype: type that it must have; any by default.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is damaged, has objects, another number of dimensions or another type, or is
            longer or shorter than its header says.
    """
    with _array_errors(file):
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.ndim != ndim:
            raise ValueError(f"an array of {ndim} dimensions is expected")
        if dtype is not None and array.dtype != dtype:
            raise ValueError(f"an array of {dtype} is expected, this one has {array.dtype}")
        if array.offset + array.nbytes != size:
            raise ValueError(f"its header needs {array.offset + array.nbytes:,} bytes, the file has {size:,}")
        return array


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read a file of ``np.savez``, which compresses nothing, so it needs as much memory as it has bytes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is damaged, or has objects.
    """
    with _array_errors(file), open_regular(file) as opened:
        with zipfile.ZipFile(opened) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


@contextmanager
def _array_errors(file: Path) -> Iterator[None]:
    """Turn errors of numpy about a file into one line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
    except (ValueError, TypeError, EOFError, KeyError, MemoryError, OverflowError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: damaged, or not an array of numbers ({one_line(error):.120})") from None


def _kind_of(mode: int) -> str:
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def is_relative_name(name: object) -> bool:
    """True if a manifest may name a file so: a relative path in its plain notation, without '..'."""
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME or "\0" in name or "\\" in name:
        return False
    # Two notations of one path could name a file twice, so only the plain one is accepted.
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."
