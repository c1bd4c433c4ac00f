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

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.console.errors import UserError, one_line
from trainer.runtime.checksums import size_and_crc32
from trainer.runtime.files import sync
from trainer.runtime.stored_files import file_inside, open_regular, read_json_object

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model"
JOB = "job.json"

ADAPTER = "lora"
"""Kind of the checkpoints of a fine-tuning job, whose model is an adapter."""

ALIGN = "align"
"""Kind of the checkpoints of an alignment of authors."""

FORESIGHT = "foresight"
"""Kind of the checkpoints of Foresight's predictor."""

_STEP = re.compile(r"step-([0-9]{8,18})")


class NewerSchema(UserError):
    """A checkpoint written by a later version, which this version cannot check."""


Count = Annotated[int, Field(ge=0, lt=1 << 63)]

MAX_RANKS = 1 << 20


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Count
    crc32: Count


class TableEntry(BaseModel):
    """Placement of one embedding table, as described by ``trainer.sparse.planner.describe_plan``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    rows: Count
    dim: Count
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
    step: Count
    number: Count
    finished: bool
    created: str
    ranks: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    zero_stage: Count
    rows_done: Count
    rows_total: Count
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


def rank_file(rank: int) -> str:
    """Return the name of the file with a rank's own state."""
    return f"rank-{rank:05d}.pt"


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
            manifest = read_manifest(directory)
            problems = check_files(directory, manifest, checksums=False) or check_complete(directory, manifest)
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
        content = read_json_object(path)
        schema, crc = content["schema_version"], content.pop("crc32")
        # The checksum comes first: a damaged number of the schema must not look like that of a newer version.
        if crc != _crc_of(content):
            raise UserError(f"{path}: damaged (its checksum does not match)")
    except FileNotFoundError:
        raise UserError(f"{directory}: not a whole checkpoint ({MANIFEST} is missing)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyError:
        raise UserError(f"{path}: damaged (not a manifest)") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error):.120})") from None
    if type(schema) is int and schema > SCHEMA:
        raise NewerSchema(f"{path}: written by a newer version (schema {schema}; this one reads up to {SCHEMA})")
    try:
        # From text, since JSON has no integer keys: pydantic converts text keys only in this mode.
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])):.120}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error):.120})") from None
    if step_of(directory) not in (None, manifest.step):
        raise UserError(
            f"{directory}: its {MANIFEST} is of step {manifest.step}; a checkpoint of this step is named "
            f"{directory_name(manifest.step)}"
        )
    return manifest


def check_complete(directory: Path, manifest: Manifest) -> list[str]:
    """Check that a manifest lists every file of its checkpoint; returns a line for each problem.

    The index of the model is read, since only it has the names of the files with the tensors.
    """
    from trainer.checkpoint.model_index import INDEX, read_index

    index = f"{MODEL}/{INDEX}"
    wanted = [JOB, index, *(rank_file(rank) for rank in range(manifest.ranks))]
    missing = [name for name in wanted if name not in manifest.files]
    if not missing:
        try:
            stored = read_index(directory / MODEL).storage_data or {}
        except UserError as error:
            return [str(error)]
        names = sorted({f"{MODEL}/{place.relative_path}" for place in stored.values()})
        missing = [name for name in names if name not in manifest.files]
    return [f"{MANIFEST} does not list {name}" for name in missing]


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
        expected = manifest.files[name]
        try:
            path = file_inside(directory, name)
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                problems.append(f"{name} has {size:,} bytes instead of {expected.bytes:,}")
            elif checksums and file_entry(path) != expected:
                problems.append(f"{name} has another content than was written")
        except UserError as error:
            problems.append(str(error))
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def file_entry(path: Path) -> FileEntry:
    """Compute the size and CRC-32 of a file."""
    size, crc = size_and_crc32(path)
    return FileEntry(bytes=size, crc32=crc)


def model_hash(directory: Path) -> str:
    """Return a hash of the model in a checkpoint, from the checksums of its files.

    Raises:
        UserError: as :func:`read_manifest`.
    """
    files = read_manifest(directory).files
    model = sorted((name, entry.bytes, entry.crc32) for name, entry in files.items() if name.startswith(f"{MODEL}/"))
    return hashlib.blake2b(repr(model).encode(), digest_size=8).hexdigest()


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
