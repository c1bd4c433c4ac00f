"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from trainer.console.errors import UserError, failure_reason, one_line


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file atomically: to a temporary file, which is synced and renamed.

    Raises:
        OSError: it cannot be written; the error has the file's name.
    """
    text = json.dumps(value, indent=1) + "\n"
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tmp_path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        tmp_path.replace(path)
    except OSError as error:
        # An error of a write has no name of a file.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            tmp_path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(file: IO[Any], size: int) -> None:
    """Give an opened file its size on the disk, before it is mapped into memory and written there.

    A write into the mapping of a file with holes kills the process when the disk is full: there is no error to catch.

    Raises:
        OSError: the disk has not so much space; the error has the file's name.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file.name)) from None


def write_fully(file: IO[bytes], content: bytes) -> None:
    """Write all bytes to an unbuffered file.

    A disk that becomes full, and a write of 2 GB or more, end in a short write, which is no error by itself.

    Raises:
        OSError: some of the bytes cannot be written.
    """
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``file``; what the block writes there is synced and renamed to ``file``.

    Raises:
        UserError: the file cannot be written.
    """
    tmp_path = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield tmp_path
        sync(tmp_path)
        tmp_path.replace(file)
    except OSError as error:
        reason = failure_reason(error)
        raise UserError(f"{file}: cannot be written ({reason})") from None
    finally:
        with suppress(OSError):
            tmp_path.unlink(missing_ok=True)


def set_usual_modes(path: Path) -> None:
    """Give a file, or a directory and all in it, the permissions that new files and directories get at that place.

    Some libraries, safetensors among them, write through a temporary file that only its owner can read, and leave it so
    when they rename it; ``tempfile.mkdtemp`` makes such directories. A file system without permissions is no error.
    """
    probe = (path if path.is_dir() else path.parent) / f".mode.{os.getpid()}"
    probe.mkdir()
    (probe / "file").touch()
    directory_mode, file_mode = (stat.S_IMODE(made.stat().st_mode) for made in (probe, probe / "file"))
    shutil.rmtree(probe)
    for entry in (path, *path.rglob("*")):
        usual = directory_mode if entry.is_dir() else file_mode
        if not entry.is_symlink() and stat.S_IMODE(entry.stat().st_mode) != usual:
            with suppress(OSError):
                entry.chmod(usual)


def write_whole(directory: Path, write: Callable[[Path], None]) -> None:
    """Write a directory atomically, and replace the one that exists.

    Args:
        directory: to write.
        write: called with the path of a temporary directory, which it makes and fills.

    Raises:
        UserError: the directory cannot be written.
    """
    tmp_path = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path)
        set_usual_modes(tmp_path)
        if directory.exists():
            replaced = directory.with_name(f".{directory.name}.replaced")
            directory.rename(replaced)
            tmp_path.rename(directory)
            shutil.rmtree(replaced)
        else:
            tmp_path.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({one_line(error)})") from None
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
