"""Disks that are full before or during the writing: one line, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from tests.nursery import Ended, Nursery


def run_on_disk(nursery: Nursery, directory: Path, line: str, kilobytes: int, *, full: bool) -> Ended:
    """Run a command beside the stored runs; its ``disk/`` is a file system of that size, which may be full already."""
    disk = directory / "disk"
    disk.mkdir(exist_ok=True)
    nursery.mount(disk, kilobytes << 10)
    seen = nursery.path(disk)
    if full:
        with contextlib.suppress(OSError), (seen / "filler").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
    return nursery.run("launch.cli.main", line.split(), directory=directory)


def assert_nothing_is_half_written(folder: Path) -> None:
    """Assert that files are whole under their names; a lock and a log may be empty."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), f"{path} was left"
        if path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict)
        assert path.suffix not in (".parquet", ".safetensors", ".npz"), path


WRITERS = [
    "train batch.toml run.directory=disk/run",
    "staytime staytime.toml run.directory=disk/run",
    "score export candidates.parquet disk/scores.parquet",
    "export batch disk/exported",
    "data simulate disk/world --users 30 --days 2",
    "stream assemble world --policy full disk/rows.parquet",
    "quantize quantize.toml codebook.directory=disk/book",
    "quantize assign codebook segments disk/codes.parquet",
]


@pytest.mark.parametrize("line", WRITERS)
def test_a_disk_that_is_full_before_the_work_starts(stored_copy: Path, nursery: Nursery, line: str) -> None:
    if not nursery.can_mount:
        pytest.skip("a small file system needs a mount namespace, which this machine does not allow")
    ended = run_on_disk(nursery, stored_copy, line, 64, full=True)
    assert ended.status == 2, ended
    assert "Traceback" not in ended.stderr, ended.stderr
    errors = [text for text in ended.stderr.splitlines() if text.startswith("limelight: error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "disk/" in errors[0], ended.stderr
    assert_nothing_is_half_written(nursery.path(stored_copy / "disk"))


@pytest.mark.parametrize(
    ("line", "kilobytes"),
    [
        ("train batch.toml run.directory=disk/run", 16),
        ("train batch.toml run.directory=disk/run", 40),
        ("staytime staytime.toml run.directory=disk/run", 16),
        ("staytime staytime.toml run.directory=disk/run", 40),
        ("export batch disk/exported", 40),
        ("quantize quantize.toml codebook.directory=disk/book", 12),
        *(
            pytest.param(line, size, marks=pytest.mark.slow)
            for line in WRITERS
            for size in (4, 8, 12, 20, 24, 28, 32, 36, 44, 52, 60, 80, 120)
        ),
    ],
)
def test_a_disk_that_is_full_during_the_first_writes(
    stored_copy: Path, nursery: Nursery, line: str, kilobytes: int
) -> None:
    if not nursery.can_mount:
        pytest.skip("a small file system needs a mount namespace, which this machine does not allow")
    ended = run_on_disk(nursery, stored_copy, line, kilobytes, full=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    # A small codebook has 20 kB with the state of its fit.
    enough = kilobytes > (0 if "parquet" in line else 20 if line.startswith("quantize") else 60)
    assert ended.status == 2 or (enough and ended.status == 0), ended
    if ended.status:
        errors = [text for text in ended.stderr.splitlines() if text.startswith("limelight: error: ")]
        assert len(errors) == 1 and "disk/" in errors[0], ended.stderr
        assert "No space left on device" in errors[0] or "is the disk full" in errors[0], ended.stderr
        if not line.startswith(("train", "staytime", "quantize quantize.toml")):
            # A run keeps what it had written whole, to be resumed; a result is there or not.
            assert not list(nursery.path(stored_copy / "disk").iterdir())
