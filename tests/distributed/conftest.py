"""A small world and a run on it that nothing disturbed, for all tests that launch jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launches import LIMELIGHT, end, job, simulate, start


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("launches") / "world")


@pytest.fixture(scope="session")
def undisturbed_run(small_world: Path) -> Path:
    """Directory of a run on two ranks that ``limelight train`` started."""
    directory = small_world.parent / "undisturbed"
    end([start(*LIMELIGHT, "train", *job(small_world, directory), "--ranks", "2")])
    return directory
