"""Files of runs, exports and codebooks that are no regular files, damaged or not readable: one line with the file."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.launch.one_line import DAMAGED, assert_one_line, command

STEP = "batch/checkpoints/step-00000007"


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        # A path of a socket has at most 107 bytes.
        opened.bind(path.name)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.mkdir()


def as_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


OPENED = [
    ("job.toml", "config check job.toml"),
    ("job.toml", "rank job.toml"),
    ("zero1.json", "rank job.toml"),
    ("world/dataset.json", "rank job.toml"),
    ("batch/config.json", "rank job.toml"),
    ("batch/deepspeed.json", "rank job.toml"),
    ("batch/environment.json", "rank job.toml"),
    ("batch/metrics.json", "rank job.toml"),
    ("batch/features/features.json", "rank job.toml"),
    ("batch/lock", "rank job.toml"),
    ("batch/config.json", "evaluate batch"),
    ("batch/deepspeed.json", "evaluate batch"),
    ("batch/features/features.json", "explain batch --user 1 --candidate 700"),
    (f"{STEP}/manifest.json", "checkpoint show batch"),
    (f"{STEP}/manifest.json", f"export {STEP} out"),
    ("candidates.parquet", "score export candidates.parquet out.parquet"),
    ("export/config.json", "score export candidates.parquet out.parquet"),
    ("export/features/features.json", "score export candidates.parquet out.parquet"),
    ("export/model.safetensors", "score export candidates.parquet out.parquet"),
    ("codebook/codebook.json", "quantize report codebook"),
    ("codebook/checksums.json", "quantize report codebook"),
    ("codebook/report.json", "quantize report codebook"),
    ("codebook/centroids-1.npy", "quantize assign codebook segments out.parquet"),
    ("segments/segments.parquet", "quantize assign codebook segments out.parquet"),
    (
        "segments/codes.parquet",
        "retrieve authors segments --author 100 --as-of 2024-03-05 --codes segments/codes.parquet",
    ),
    ("segments/embeddings/segments/manifest.json", "quantize assign codebook segments out.parquet"),
]
"""File with a fixed name -> a command that opens it."""


@pytest.mark.parametrize(("name", "line"), OPENED)
def test_a_file_that_is_no_regular_file_is_refused_before_it_is_read(
    stored: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored)
    path, kept = Path(name), Path("kept")
    if path.exists():
        path.rename(kept)
    try:
        for make in (as_fifo, as_socket, as_device, as_folder, as_sparse):
            if make is as_sparse and path.suffix not in (".json", ".toml"):
                continue
            if make is as_folder and path.suffix == ".parquet":
                continue
            monkeypatch.chdir(stored / path.parent)
            make(stored / path)
            monkeypatch.chdir(stored)
            try:
                assert_one_line(command(*line.split()), path.name)
            finally:
                path.rmdir() if make is as_folder else path.unlink()
    finally:
        if kept.exists():
            kept.rename(path)


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, line in OPENED if name.endswith(".json")])
def test_damaged_json_of_a_run_is_one_line(stored: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    path = Path(name)
    before = path.read_bytes()
    try:
        for content in DAMAGED:
            if name == "zero1.json" and content == b"{}":
                # An empty object has all of DeepSpeed's defaults.
                continue
            path.write_bytes(content)
            assert_one_line(command(*line.split()))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(("name", "line"), OPENED)
def test_an_error_of_the_lowest_call_is_one_line(
    stored: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user who runs the tests may have all rights, so that the system's call fails instead of the permission."""
    monkeypatch.chdir(stored)
    opened = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *arguments, **options)

    Path(name).touch()
    monkeypatch.setattr(os, "open", refuse)
    assert_one_line(command(*line.split()), Path(name).name, "Permission denied")
