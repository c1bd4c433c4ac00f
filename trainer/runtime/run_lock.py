"""The lock of a run's directory: one job at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.console.errors import UserError
from trainer.runtime.stored_files import open_regular


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
        yield


def is_locked(directory: Path) -> bool:
    """True if a job of another process runs in a directory."""
    try:
        with (directory / "lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _owner(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(text)
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    return "its process id is not written yet"
