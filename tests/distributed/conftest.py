"""Fixtures of the tests that launch jobs: a small dataset and an undisturbed run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launches import LIMELIGHT, end, job, simulate, start


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("launches") / "world")


@pytest.fixture(scope="session")
def undisturbed_run(small_world: Path) -> Path:
    """Return the directory of a run of ``limelight train`` on two ranks."""
    directory = small_world.parent / "undisturbed"
    end([start(*LIMELIGHT, "train", *job(small_world, directory), "--ranks", "2")])
    return directory
