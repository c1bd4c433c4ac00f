"""Retention of checkpoints, and the order in which a checkpoint reaches the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_manifest import example
from trainer.checkpoint.manifest import directory_name, list_checkpoints, read_manifest, write_manifest
from trainer.checkpoint.writer import Save, _retire
from trainer.config.sections import CheckpointConfig
from trainer.runtime.distributed import World


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


@pytest.mark.parametrize("keep_every", [0, 2, 3, 5])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept_and_every_nth_for_ever(tmp_path: Path, keep: int, keep_every: int) -> None:
    settings = CheckpointConfig(keep=keep, keep_every=keep_every)
    for number in range(1, 12):
        # Steps that share no factor with the numbers of the saves, by which ``keep_every`` counts.
        path = tmp_path / directory_name(7 * number + 1)
        path.mkdir()
        write_manifest(path, example(step=7 * number + 1, number=number))
        _retire(tmp_path, settings)
        kept = {read_manifest(each).number for each in list_checkpoints(tmp_path)}
        newest = set(range(max(1, number - keep + 1), number + 1))
        assert kept == newest | {each for each in range(1, number + 1) if keep_every and each % keep_every == 0}


def save_of(directory: Path, world: World, step: int) -> Save:
    return Save(
        directory=directory,
        model={"table": torch.arange(12.0), "steps": torch.tensor(step)},
        own={"random": torch.zeros(3)},
        job={"config": {}, "trace": []},
        manifest=example(step=step, number=1),
        position={0: (0, 1, 2)},
        settings=CheckpointConfig(keep=3),
        rank=0,
        group=world.control,
    )


@pytest.mark.parametrize("replaced", [False, True])
def test_files_reach_the_disk_before_their_names_and_names_before_the_rename(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Without this order, a power failure may leave a checkpoint under its final name with empty files."""
    if replaced:
        save_of(tmp_path, world, 5).write()
    # A name is renamed as the last act, so inodes tell which file or directory was flushed.
    calls: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        # Only content that is there by now is flushed.
        calls.append(("sync", found.st_ino if stat.S_ISDIR(found.st_mode) or found.st_size else -1))

    def recording_rename(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        calls.append((f"rename to {Path(target).name}", os.stat(source).st_ino))
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", recording_fsync)
        patched.setattr(os, "rename", recording_rename)
        final, _ = save_of(tmp_path, world, 5).write()

    def synced(path: Path) -> list[int]:
        return [place for place, call in enumerate(calls) if call == ("sync", path.stat().st_ino)]

    renamed = calls.index((f"rename to {final.name}", final.stat().st_ino))
    files = [path for path in final.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"manifest.json", "job.json", "rank-00000.pt", ".metadata", "__0_0.distcp"}
    for path in files:
        assert synced(path), f"{path.name} is flushed"
        # Its name is in the directory when the directory is flushed.
        assert max(synced(path)) < max(synced(path.parent)) < renamed, path.name
    assert min(synced(tmp_path), default=-1) > renamed, "the new name is flushed"
    manifest = final / "manifest.json"
    assert all(max(synced(path)) < min(synced(manifest)) for path in files if path != manifest), "it is written last"
