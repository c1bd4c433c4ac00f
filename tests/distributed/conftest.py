"""Fixtures of the tests that launch jobs: a small dataset and an undisturbed run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Limelight
from tests.distributed.launches import job
from trainer.data.simulator.write_dataset import simulate


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 200 users, small enough for a run of a few seconds."""
    path = tmp_path_factory.mktemp("launches") / "world"
    simulate(path, users=200, days=3, partitions=4, seed=5)
    return path


@pytest.fixture(scope="session")
def undisturbed_run(limelight: Limelight, small_world: Path) -> Path:
    """Return the directory of a run of ``limelight train`` on two ranks."""
    directory = small_world.parent / "undisturbed"
    limelight("train", *job(small_world, directory), "--ranks", "2")
    return directory
