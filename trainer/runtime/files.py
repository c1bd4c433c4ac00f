"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError, one_line


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON aside, sync it and rename, so that a reader never sees half of it."""
    text = json.dumps(value, indent=1) + "\n"
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync(path: Path) -> None:
    """Have what a file holds, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(directory: Path, write: Callable[[Path], None]) -> None:
    """Have a directory written aside and renamed, so that half of it is never seen; what was there is replaced.

    Raises:
        UserError: it cannot be written.
    """
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        if directory.exists():
            replaced = directory.with_name(f".{directory.name}.replaced")
            directory.rename(replaced)
            aside.rename(directory)
            shutil.rmtree(replaced)
        else:
            aside.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({one_line(error)})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
