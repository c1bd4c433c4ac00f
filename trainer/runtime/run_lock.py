"""One job at a time on a run's directory."""

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


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run's directory.

    It is a POSIX record lock: it belongs to this process alone, not to the loader processes that it forks, and the
    kernel takes it back however this process ends. The file that stays behind says nothing.

    Raises:
        UserError: another process has it, with what it has written down about itself; or the file cannot be written.
    """
    path = directory / "lock"
    try:
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
                "run.directory"
            ) from None
        file.truncate(0)
        json.dump({"host": platform.node(), "process": os.getpid(), "since": time.strftime("%F %T")}, file)
        file.flush()
        yield


def is_locked(directory: Path) -> bool:
    """Whether a job of another process runs in a directory."""
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
    return "which has not said its name yet"
