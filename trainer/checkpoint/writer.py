"""Writes a checkpoint atomically, from one thread of each rank.

Each rank writes its shards and its own state to a directory with a temporary name. When the files of all ranks are on
disk, the first rank writes the manifest and renames the directory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.checkpoint.manifest import (
    JOB,
    MODEL,
    FileEntry,
    Manifest,
    NewerSchema,
    check_files,
    directory_name,
    file_entry,
    list_checkpoints,
    rank_file,
    read_manifest,
    write_manifest,
)
from trainer.checkpoint.model_state import State, write_state
from trainer.config.sections import CheckpointConfig
from trainer.console.errors import UserError, one_line
from trainer.runtime.files import sync, write_json

T = TypeVar("T")

_REPLACED = ".replaced"
"""Suffix of a checkpoint that is being replaced; it is restored if the replacement does not complete."""


@dataclass(frozen=True)
class Save:
    """One save, as one rank writes it.

    Attributes:
        directory: of the checkpoints, on a file system that all ranks share.
        model: state in blocks, see ``trainer.checkpoint.model_state.in_blocks``.
        own: state of this rank alone, as tensors, numbers and strings.
        job: the resolved job and the metric history; the first rank writes it.
        manifest: without positions and files.
        position: of this rank's partitions.
        settings: number of checkpoints to keep.
        rank: of this process.
        group: process group of the writing threads; nothing else uses it during a save.
    """

    directory: Path
    model: State
    own: dict[str, Any]
    job: dict[str, Any]
    manifest: Manifest
    position: dict[int, tuple[int, ...]]
    settings: CheckpointConfig
    rank: int
    group: dist.ProcessGroup

    def write(self) -> tuple[Path, int]:
        """Write the checkpoint and flush it to disk; returns its directory and size in bytes. Collective.

        Raises:
            UserError: on every rank, if one of them cannot write; no files are left behind.
        """
        token = self._together(lambda: os.urandom(4).hex())[0]
        tmp_path = self.directory / f".{directory_name(self.manifest.step)}.partial-{token}"
        try:
            self._together(lambda: tmp_path.mkdir() if self.rank == 0 else None)
            write_state(self.model, tmp_path / MODEL, self.group)
            written = self._together(lambda: self._write_own(tmp_path))
            final = self._together(lambda: self._commit(tmp_path, written) if self.rank == 0 else None)[0]
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(tmp_path, ignore_errors=True)
            raise
        assert final is not None
        return final

    def _write_own(self, tmp_path: Path) -> tuple[dict[str, FileEntry], dict[int, tuple[int, ...]]]:
        """Write this rank's files; returns them with their checksums, and the rank's position."""
        path = tmp_path / rank_file(self.rank)
        with path.open("wb") as file:
            torch.save(self.own, file)
            file.flush()
            os.fsync(file.fileno())
        mine = [path, *(tmp_path / MODEL).glob(f"__{self.rank}_*.distcp")]
        if self.rank == 0:
            write_json(tmp_path / JOB, self.job)
            # torch syncs this file before it flushes Python's buffer.
            sync(tmp_path / MODEL / ".metadata")
            mine += [tmp_path / JOB, tmp_path / MODEL / ".metadata"]
        return {str(file.relative_to(tmp_path)): file_entry(file) for file in mine}, self.position

    def _commit(
        self, tmp_path: Path, written: list[tuple[dict[str, FileEntry], dict[int, tuple[int, ...]]]]
    ) -> tuple[Path, int]:
        files = {name: entry for entries, _ in written for name, entry in sorted(entries.items())}
        positions = {partition: at for _, part in written for partition, at in part.items()}
        manifest = self.manifest.model_copy(update={"files": files, "positions": dict(sorted(positions.items()))})
        if problems := check_files(tmp_path, manifest, checksums=False):
            raise UserError(
                f"{tmp_path}: {problems[0]}, as seen by the first rank; run.directory must be on a file system that "
                "all machines share"
            )
        sync(tmp_path / MODEL)
        write_manifest(tmp_path, manifest)
        final = self.directory / directory_name(manifest.step)
        replaced = final.with_name(f".{final.name}{_REPLACED}")
        if final.exists():
            # It was damaged and the run resumed from an older one, or the run was stopped at its very end.
            final.rename(replaced)
        tmp_path.rename(final)
        sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        _retire(self.directory, self.settings)
        return final, manifest.bytes

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Return the results of all ranks in order; a failure on one rank raises on all of them."""
        mine: tuple[T | None, str | None] = None, None
        try:
            mine = work(), None
        except Exception as error:
            # Any exception: the other ranks must learn of it, or they would wait for this rank forever.
            mine = None, one_line(error)
        results: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(results, mine, group=self.group)
        for _, failure in results:
            if failure is not None:
                raise UserError(f"checkpoint after step {self.manifest.step}: {failure}")
        return [result for result, _ in results]


def clear(directory: Path) -> None:
    """Make the directory of checkpoints, and remove incomplete ones that a killed run left."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for replaced in directory.glob(f".step-*{_REPLACED}"):
            final = directory / replaced.name.removeprefix(".").removesuffix(_REPLACED)
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)
        for left in (*directory.glob(".step-*.partial-*"), *directory.glob(".step-*.old-*")):
            shutil.rmtree(left)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from None


def _retire(directory: Path, settings: CheckpointConfig) -> None:
    """Remove checkpoints that are neither among the newest ``keep`` nor kept by ``keep_every``."""
    numbers: dict[Path, int] = {}
    for entry in list_checkpoints(directory):
        try:
            numbers[entry] = read_manifest(entry).number
        except NewerSchema:
            continue
        except UserError:
            _remove(entry)
    for entry, number in list(numbers.items())[: -settings.keep]:
        if not settings.keep_every or number % settings.keep_every:
            _remove(entry)


def _remove(directory: Path) -> None:
    """Remove a checkpoint after a rename, so that its name never refers to an incomplete one."""
    old = directory.with_name(f".{directory.name}.old-{os.urandom(4).hex()}")
    directory.rename(old)
    shutil.rmtree(old, ignore_errors=True)
