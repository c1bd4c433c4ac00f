"""Runs, an export, a codebook and their data, as stored by an earlier version."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.launch.one_line import write_text
from tests.paths import ROOT
from tests.semantic_ids.segment_world import assigned, make_version, write_world

STORED = ROOT / "tests/checkpoint/stored/runs_0.1.tar.xz"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, an export and their data; paths in them are relative to this directory."""
    directory = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as archive:
        archive.extractall(directory, filter="data")
    write_text(directory / "batch/metrics.json", '{"model": "cgc", "behaviours": {}}')
    (directory / "job.toml").write_text((directory / "batch.toml").read_text())
    write_world(directory / "segments")
    assigned(make_version(directory / "codebook", 4, 3, report={"segments": 1}), directory / "segments")
    (directory / "quantize.toml").write_text(
        '[data]\npath = "segments"\n[codebook]\ndirectory = "book"\nlevels = [8, 4]\ndevice = "cpu"\n'
    )
    return directory


@pytest.fixture
def stored_copy(stored: Path, tmp_path: Path) -> Path:
    """Copy of the stored runs that a test may write to."""
    shutil.copytree(stored, tmp_path / "stored")
    (tmp_path / "stored/batch/metrics.json").unlink()
    return tmp_path / "stored"
