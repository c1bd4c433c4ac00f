"""Whatever scoring and evaluation load is verified once: one flipped bit anywhere in a run or export is refused."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import ROOT
from trainer.checkpoint.manifest import list_checkpoints
from trainer.comment_staytime.scoring import score_range
from trainer.console.errors import UserError
from trainer.data.format.verification import record_dataset, verify_dataset
from trainer.runtime.checksums import CHECKSUMS, write_checksums
from trainer.runtime.distributed import World
from trainer.serving.export import export_checkpoint
from trainer.serving.exported_model import open_export
from trainer.serving.trained_run import open_run

STORED = ROOT / "tests/checkpoint/stored/runs_0.1.tar.xz"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of an earlier version, whose relative paths belong to this directory."""
    directory = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as archive:
        archive.extractall(directory, filter="data")
    return directory


def check_every_file(directory: Path, opened: Callable[[], object]) -> None:
    """Flip a bit in each file of a directory, and cut its end off; opening must refuse both, and name the file."""
    opened()
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        for wrong in (content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :], content[:-2]):
            file.write_bytes(wrong)
            with pytest.raises(UserError) as refused:
                opened()
            assert "\n" not in str(refused.value) and file.name in str(refused.value)
        file.write_bytes(content)
    opened()


def test_an_export_is_verified(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    open_export("export")
    assert not (stored / "export" / CHECKSUMS).exists(), "an export of an earlier version opens as before"
    export_checkpoint("batch", "new")
    check_every_file(stored / "new", lambda: open_export("new"))


def test_a_run_is_verified(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    shutil.copytree("batch", "verified")
    write_checksums(Path("verified/features"), ("features.json", "vocabularies.npz"))
    write_checksums(Path("verified"), ("config.json", "deepspeed.json"))
    with World.join("cpu") as world:
        open_run("batch", world)
        (checkpoint,) = list_checkpoints(Path("verified/checkpoints"))
        for part in (checkpoint, Path("verified/features")):
            check_every_file(part, lambda: open_run("verified", world))
        for name in ("config.json", "deepspeed.json"):
            content = Path("verified", name).read_text()
            Path("verified", name).write_text(content.replace("1", "2", 1))
            with pytest.raises(UserError, match=f"{name}: damaged"):
                open_run("verified", world)
            Path("verified", name).write_text(content)


def test_the_dataset_of_a_run_is_verified(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    shutil.copytree("world", "whole")
    found = verify_dataset("world", lambda what, done, total: None)
    assert not found.problems and not found.has_checksums, "a dataset of an earlier version is read as before"
    assert not record_dataset("world", lambda what, done, total: None).problems
    with World.join("cpu") as world:
        files = [*Path("world/history").iterdir(), *Path("world/rows").iterdir()]
        files += [Path("world/dataset.json"), Path("world", CHECKSUMS)]
        for file in files:
            content = file.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
            # A bit in a record of the rows is found when the record is read.
            for wrong in (b"", content[:-2], content + b"x", *([] if file.suffix == ".tar" else [flipped])):
                file.write_bytes(wrong)
                with pytest.raises(UserError) as refused:
                    open_run("batch", world)
                assert "\n" not in str(refused.value) and file.name in str(refused.value)
            file.write_bytes(content)
        open_run("batch", world)
    shutil.rmtree("world")
    Path("whole").rename("world")


def test_a_staytime_run_is_verified(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    names = ("config.json", "fitted.json", "model.safetensors")
    run = Path("staytime")
    write_checksums(run, names)
    for name in names:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
        with pytest.raises(UserError) as refused:
            score_range(run, Path("out.parquet"))
        assert name in str(refused.value) and "\n" not in str(refused.value)
        (run / name).write_bytes(content)
