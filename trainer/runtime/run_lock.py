"""The lock of a run's directory: one job at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError
from trainer.runtime.stored_files import open_regular, parse_json_object, read_limited

_MAX_BYTES = 1 << 12
_FLOCK = "hhqqi4x"
"""``struct flock`` of 64-bit Linux: type, whence, start, length, process."""

_held: set[Path] = set()
"""Directories that this process has locked. The kernel drops the lock when any descriptor of the file is closed, so the
file must not be opened again by this process."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run's directory.

    A POSIX record lock belongs to this process alone, not to the loader processes that it forks, and the kernel
    releases it however the process ends. A lock file that stays behind has no meaning.

    Raises:
        UserError: another process holds the lock (its host and process id are named), or the file cannot be written.
    """
    path = directory / "lock"
    try:
        if path.exists():
            # A FIFO or a device cannot be locked.
            open_regular(path).close()
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{directory}: another job is running here ({_owner(file.read())}); wait for it, or use another "
                "directory"
            ) from None
        owner = {"host": platform.node(), "process": os.getpid(), "since": time.strftime("%F %T")}
        try:
            file.truncate(0)
            # Without a buffer, which would be written once more when the file is closed.
            os.write(file.fileno(), json.dumps(owner).encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        held = directory.resolve()
        _held.add(held)
        try:
            yield
        finally:
            _held.discard(held)


def is_locked(directory: Path) -> bool:
    """True if a job of another process runs in a directory. The lock is only asked for, never taken."""
    if directory.resolve() in _held:
        return False
    try:
        with open_regular(directory / "lock") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind: int = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except FileNotFoundError:
        return False
    except (OSError, UserError):
        return True
    return kind != fcntl.F_UNLCK


def lock_owner(directory: Path) -> dict[str, Any]:
    """Return ``host``, ``process`` and ``since`` of the job that locked a directory last, as far as they are known."""
    if directory.resolve() in _held:
        return {"host": platform.node(), "process": os.getpid()}
    try:
        return parse_json_object(read_limited(directory / "lock", _MAX_BYTES), directory / "lock")
    except (OSError, UserError):
        return {}


def _owner(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(text)
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    return "its process id is not written yet"
