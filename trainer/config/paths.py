"""Keys of job files that are paths: outputs are checked, relative paths become absolute before they are stored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.toml import Model
from trainer.console.errors import UserError
from trainer.console.outputs import local_path
from trainer.console.setup_advice import MLFLOW, OptionalPackage


@dataclass(frozen=True)
class PathMark:
    """Mark of a key whose value is a path, or a list of paths.

    Attributes:
        instead: advice for a URL, if the key is an output that must be local; empty for an input.
        servers: protocols of URLs that an output may have all the same, since they name a server.
        writer: package that writes an output and that not every installation has.
    """

    instead: str = ""
    servers: tuple[str, ...] = ()
    writer: OptionalPackage | None = None

    def names_server(self, value: object) -> bool:
        """True if a value is the URL of a server."""
        return isinstance(value, str) and value.partition("://")[0] in self.servers and "://" in value


InputFile = Annotated[str, PathMark()]
"""Key of a file or directory that is read. The hub id of a model is not a path and is not changed."""

InputFiles = Annotated[tuple[str, ...], PathMark()]

StoreInput = Annotated[str, PathMark(servers=("redis", "rediss", "unix"))]
"""Key of a store of recent codes that is read."""

RunDirectory = Annotated[
    str,
    PathMark(
        "a job locks it, appends to its logs and replaces its checkpoints; set a local path, and copy the finished run "
        "or give a URL to `limelight export`"
    ),
]

StoreDirectory = Annotated[str, PathMark("MLflow writes a file store file by file; set a local path", writer=MLFLOW)]
"""Key of the directory of an MLflow file store."""

TableDirectory = Annotated[
    str,
    PathMark("later jobs reuse and map the vectors that are there; set a local path and copy the finished tables"),
]

VersionDirectory = Annotated[
    str,
    PathMark("a job keeps its checkpoints beside it and renames it when it is whole; set a local path and copy it"),
]
"""Key of a codebook version's directory."""

StoreAddress = Annotated[
    str,
    PathMark(
        "a store of recent codes is an SQLite file or a Redis database; set a local path, or redis://HOST:PORT/DATABASE",
        servers=("redis", "rediss", "unix"),
    ),
]
"""Key of a store of recent codes."""


def path_mark(info: FieldInfo) -> PathMark | None:
    """Return the mark of a key that is a path; None for other keys."""
    return next((mark for mark in info.metadata if isinstance(mark, PathMark)), None)


def check_outputs(job: BaseModel, prefix: str = "") -> None:
    """Check that each output of a job is a local path, and that a package that writes it is installed.

    Args:
        job: the job, or a section of it.
        prefix: name of the section and a dot, for the message.

    Raises:
        UserError: an output is a URL of another protocol than ``file://``, or its package is not installed; the line
            names the key.
    """
    for name, info in type(job).model_fields.items():
        value, mark = getattr(job, name), path_mark(info)
        if isinstance(value, BaseModel):
            check_outputs(value, f"{prefix}{name}.")
        elif mark is not None and mark.instead and value and not mark.names_server(value):
            try:
                local_path(value, "it", mark.instead)
            except UserError as error:
                raise UserError(f"{prefix}{name} = {error}") from None
            if mark.writer is not None and not mark.writer.is_installed:
                raise UserError(f"{prefix}{name} = {value!r}: {mark.writer.advice}")


def absolute_paths(job: Model) -> Model:
    """Return a job whose relative paths are absolute, so that it means the same in every directory.

    An input that does not exist is not changed: it may be a hub id, or a path that an earlier version stored relative
    to another directory.
    """
    changes: dict[str, Any] = {}
    for name, info in type(job).model_fields.items():
        value = getattr(job, name)
        if isinstance(value, BaseModel):
            changes[name] = absolute_paths(value)
        elif isinstance(value, dict) and any(isinstance(inner, BaseModel) for inner in value.values()):
            changes[name] = {key: absolute_paths(inner) for key, inner in value.items()}
        elif (mark := path_mark(info)) is not None and value:
            if mark.names_server(value):
                continue
            if mark.instead:
                changes[name] = os.path.abspath(local_path(value))
            else:
                changes[name] = absolute(value) if isinstance(value, str) else tuple(map(absolute, value))
    return job.model_copy(update=changes)


def absolute(path: str) -> str:
    """Return the absolute path of something that exists; URLs, and names of nothing that exists, stay as they are."""
    return os.path.abspath(path) if path and "://" not in path and Path(path).exists() else path
