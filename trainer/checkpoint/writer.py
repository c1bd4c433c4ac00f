"""How a checkpoint gets on disk whole or not at all, from the threads of all ranks.

Each rank writes its shards and what only it has to a directory under a name that no reader looks at. When all files of
all ranks are on disk the first rank writes the manifest and renames the directory.
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
    read_manifest,
    write_manifest,
)
from trainer.checkpoint.model_state import State, write_state
from trainer.config.sections import CheckpointConfig
from trainer.console.errors import UserError, one_line
from trainer.runtime.files import sync, write_json

T = TypeVar("T")

_REPLACED = ".replaced"
"""Ending of a checkpoint's name while another one takes its place: it is put back if that did not come to its end."""


@dataclass(frozen=True)
class Save:
    """One save, as a rank writes it.

    Attributes:
        directory: that holds the checkpoints, on a file system that all ranks share.
        model: in blocks, see ``trainer.checkpoint.model_state.in_blocks``.
        own: what only this rank has, as tensors, numbers and strings.
        job: the resolved job and the trace; the first rank's is written.
        manifest: without positions and files.
        position: of this rank's partitions.
        settings: what is kept.
        rank: of this process.
        group: over which the ranks agree; nothing else uses it meanwhile.
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
        """Write, and have all of it on disk under its name. Collective. The directory and its size in bytes.

        Raises:
            UserError: on every rank, when one of them cannot write; nothing is left behind.
        """
        token = self._together(lambda: os.urandom(4).hex())[0]
        aside = self.directory / f".{directory_name(self.manifest.step)}.partial-{token}"
        try:
            self._together(lambda: aside.mkdir() if self.rank == 0 else None)
            write_state(self.model, aside / MODEL, self.group)
            written = self._together(lambda: self._write_own(aside))
            final = self._together(lambda: self._commit(aside, written) if self.rank == 0 else None)[0]
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        assert final is not None
        return final

    def _write_own(self, aside: Path) -> tuple[dict[str, FileEntry], dict[int, tuple[int, ...]]]:
        """This rank's files with their checksums, and its position."""
        path = aside / rank_file(self.rank)
        with path.open("wb") as file:
            torch.save(self.own, file)
            file.flush()
            os.fsync(file.fileno())
        mine = [path, *(aside / MODEL).glob(f"__{self.rank}_*.distcp")]
        if self.rank == 0:
            write_json(aside / JOB, self.job)
            # torch syncs it while it is still in a buffer of Python's.
            sync(aside / MODEL / ".metadata")
            mine += [aside / JOB, aside / MODEL / ".metadata"]
        return {str(file.relative_to(aside)): file_entry(file) for file in mine}, self.position

    def _commit(
        self, aside: Path, written: list[tuple[dict[str, FileEntry], dict[int, tuple[int, ...]]]]
    ) -> tuple[Path, int]:
        files = {name: entry for entries, _ in written for name, entry in sorted(entries.items())}
        positions = {partition: at for _, part in written for partition, at in part.items()}
        manifest = self.manifest.model_copy(update={"files": files, "positions": dict(sorted(positions.items()))})
        if problems := check_files(aside, manifest, checksums=False):
            raise UserError(
                f"{aside}: {problems[0]}, as the first rank sees it; run.directory must be on a file system that all "
                "machines share"
            )
        sync(aside / MODEL)
        write_manifest(aside, manifest)
        final = self.directory / directory_name(manifest.step)
        replaced = final.with_name(f".{final.name}{_REPLACED}")
        if final.exists():
            # Damaged, so that the run went back behind it; or of a run that was stopped at its very end.
            final.rename(replaced)
        aside.rename(final)
        sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        _retire(self.directory, self.settings)
        return final, manifest.bytes

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What the ranks' work gave, in order of rank; if it failed on one, it fails on all."""
        mine: tuple[T | None, str | None] = None, None
        try:
            mine = work(), None
        except Exception as error:
            # Whatever it was: the other ranks must hear of it, or they would wait for this one for ever.
            mine = None, one_line(error)
        results: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(results, mine, group=self.group)
        for _, failure in results:
            if failure is not None:
                raise UserError(f"checkpoint after step {self.manifest.step}: {failure}")
        return [result for result, _ in results]


def rank_file(rank: int) -> str:
    """File of :func:`rank_state` of a rank."""
    return f"rank-{rank:05d}.pt"


def clear(directory: Path) -> None:
    """Make the directory, and remove what a killed run left in it."""
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
    """Remove what is neither among the newest nor kept for good."""
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
    """Remove a checkpoint so that at no moment half of it stands under its name."""
    aside = directory.with_name(f".{directory.name}.old-{os.urandom(4).hex()}")
    directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
