"""The manifest of a checkpoint, and the search for complete checkpoints. Files only, no ranks.

::

    checkpoints/step-00000120/
        model/           tables, dense network and their optimizers (torch.distributed.checkpoint)
        rank-00000.pt    state of one rank: random states, progressive metrics, sums of the open metric window
        job.json         the resolved job, and the metric history so far
        manifest.json    written last: the content, with the size and CRC-32 of every file and of itself

A checkpoint is written under a temporary name and renamed when all of its files are on disk. Readers accept only a
directory whose manifest is valid and whose files agree with it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.console.errors import UserError
from trainer.runtime.files import sync

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model"
JOB = "job.json"

ADAPTER = "lora"
"""Kind of the checkpoints of a fine-tuning job, whose model is an adapter."""

_STEP = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES = 16 << 20


class NewerSchema(UserError):
    """A checkpoint written by a later version, which this version cannot check."""


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    crc32: int


class TableEntry(BaseModel):
    """Placement of one embedding table, as described by ``trainer.sparse.planner.describe_plan``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    rows: int
    dim: int
    module: str
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    shards: tuple[tuple[int, int], ...]


class DatasetEntry(BaseModel):
    """Dataset of a run; the fingerprint covers its schema and the index of its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    fingerprint: str


class Manifest(BaseModel):
    """Content of a checkpoint.

    Attributes:
        step: number of optimizer steps.
        number: number of this save in its run, from 1.
        finished: True at the end of training.
        created: local time, ISO.
        ranks: number of ranks that wrote it.
        zero_stage: DeepSpeed's ZeRO stage, for the record; any other stage can load it.
        rows_done: rows trained on by all ranks.
        rows_total: rows of all ranks over all epochs; 0 for a stream, whose length is unknown.
        kind: network of the ranker.
        behaviours: predicted behaviours, in order.
        table_optimizer: optimizer of the tables.
        tables: placement of each table, in order.
        dense: parameter -> shape.
        buffers: buffer -> shape.
        dataset: to which the positions belong.
        positions: partition -> ``[epoch, window, offset]`` of stored rows, see ``ReadPosition`` in
            ``trainer.data.loading.batch``, or ``[place, inside, latest_ms, rejected]`` of a stream, see
            ``trainer.stream.sources.source``.
        files: path below the directory -> size and checksum, for all files but the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    step: int
    number: int
    finished: bool
    created: str
    ranks: int
    zero_stage: int
    rows_done: int
    rows_total: int
    kind: str
    behaviours: tuple[str, ...]
    table_optimizer: str
    tables: tuple[TableEntry, ...]
    dense: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    dataset: DatasetEntry
    positions: dict[int, tuple[int, ...]]
    files: dict[str, FileEntry]

    @property
    def bytes(self) -> int:
        """Return the size of all files."""
        return sum(entry.bytes for entry in self.files.values())


def directory_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """Return the step in a checkpoint's directory name, or ``None`` for other names."""
    match = _STEP.fullmatch(directory.name)
    return int(match.group(1)) if match else None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the directories with a checkpoint's name below ``RUN/checkpoints``, complete or not, by ascending step."""
    if not checkpoints.is_dir():
        return []
    found = [(step_of(entry), entry) for entry in checkpoints.iterdir() if entry.is_dir()]
    return [entry for _, entry in sorted((step, entry) for step, entry in found if step is not None)]


def checkpoints_at(path: str | Path) -> list[Path]:
    """List the checkpoints that a path means, complete or not: itself, or those of a run or its ``checkpoints/``."""
    given = Path(path)
    if (given / MANIFEST).exists() or (step_of(given) is not None and given.is_dir()):
        return [given]
    return list_checkpoints(given if given.name == "checkpoints" else given / "checkpoints")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path means: the path itself, or the newest complete checkpoint of a run.

    A checkpoint is complete if its manifest is valid and every file exists with its size. Checksums are not computed.

    Raises:
        UserError: the path is neither, or no checkpoint is complete; the reason for each is named.
    """
    found = checkpoints_at(path)
    if found == [Path(path)]:
        return found[0]
    reasons = []
    for directory in reversed(found):
        try:
            problems = check_files(directory, read_manifest(directory), checksums=False)
        except UserError as error:
            problems = [str(error)]
        if not problems:
            return directory
        reasons.append(f"{directory.name}: {problems[0]}")
    if reasons:
        raise UserError(f"{found[0].parent}: no whole checkpoint ({'; '.join(reasons)})")
    raise UserError(f"{path}: no checkpoint and no run with checkpoints here")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write and sync the manifest and the directory, as the last step before the rename."""
    content = manifest.model_dump(mode="json")
    path = directory / MANIFEST
    with path.open("w") as file:
        json.dump({**content, "crc32": _crc_of(content)}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    sync(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        UserError: the manifest is missing, damaged or unreadable, or a newer version wrote it (:class:`NewerSchema`).
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        schema, crc = int(content["schema_version"]), content.pop("crc32")
    except FileNotFoundError:
        raise UserError(f"{directory}: not a whole checkpoint ({MANIFEST} is missing)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: damaged (not a manifest)") from None
    if schema > SCHEMA:
        raise NewerSchema(f"{path}: written by a newer version (schema {schema}; this one reads up to {SCHEMA})")
    if crc != _crc_of(content):
        raise UserError(f"{path}: damaged (its checksum does not match)")
    try:
        # From text, since JSON has no integer keys: pydantic converts text keys only in this mode.
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def check_files(
    directory: Path, manifest: Manifest, names: Iterable[str] | None = None, *, checksums: bool = True
) -> list[str]:
    """Compare the files of a checkpoint with its manifest; returns a line for each problem.

    Args:
        directory: of the checkpoint.
        manifest: of the checkpoint.
        names: files to check; all by default.
        checksums: read the files and compare checksums; otherwise only sizes are compared.
    """
    problems = []
    for name in manifest.files if names is None else names:
        path, expected = directory / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                problems.append(f"{name} has {size:,} bytes instead of {expected.bytes:,}")
            elif checksums and file_entry(path) != expected:
                problems.append(f"{name} has another content than was written")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def file_entry(path: Path) -> FileEntry:
    """Compute the size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileEntry(bytes=size, crc32=crc)


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
