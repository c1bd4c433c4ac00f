"""Memory of whole ranks: the sum of a plan's parts beside the kernel's peak of real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RunRanks
from trainer.data.simulator.write_dataset import simulate


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rank_memory") / "world"
    simulate(path, users=600, days=6, partitions=4, seed=1)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_needs_the_memory_of_its_plan(run_ranks: RunRanks, world: Path, tmp_path: Path, ranks: int) -> None:
    printed = run_ranks("tests.planning.rank_peaks", tmp_path, world, 'tables.optimizer="adagrad"', ranks=ranks)
    of_ranks = json.loads(printed.splitlines()[-1])
    measured = [of_rank["measured"] for of_rank in of_ranks]
    memory = of_ranks[0]["plan"]
    fullest = memory["fullest"]
    assert {"searched histories", "search vectors", "checkpoint snapshot", "exchange"} <= fullest.keys()
    # The small job before has loaded what "process" stands for.
    planned = memory["fullest_total"] - fullest["process"]
    assert planned == pytest.approx(max(measured), rel=0.2), fullest
    least = memory["emptiest_total"] - fullest["process"]
    assert least == pytest.approx(min(measured), rel=0.2)
