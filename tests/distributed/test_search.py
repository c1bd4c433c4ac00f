"""Training with searches on two ranks: independent of loader processes and of stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.distributed.test_export import write_candidates
from trainer.data.simulator.write_dataset import simulate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("search")
    simulate(out / "world", users=70, days=3, partitions=4, seed=3)
    run_ranks("tests.distributed.search_ranks", out, out / "world", timeout=600)
    return {**torch.load(out / "outcome.pt"), "out": out}


def test_stopping_and_resuming_is_bitwise_equal(outcomes: dict[str, Any]) -> None:
    """The stop is between two refreshes, and the checkpoints before it are at other steps than the refreshes."""
    through, stopped, resumed = outcomes["through"], outcomes["stopped"], outcomes["resumed"]
    assert stopped["report"] is None and 8 < stopped["step"] < through["step"]
    assert stopped["losses"] + resumed["losses"] == through["losses"]
    assert resumed["report"] == through["report"]
    for name, tensor in through["saved"].items():
        assert torch.equal(tensor, resumed["saved"][name]), name


def test_batches_made_ahead_are_the_same(outcomes: dict[str, Any]) -> None:
    assert outcomes["workers"]["losses"] == outcomes["through"]["losses"]
    assert outcomes["workers"]["report"] == outcomes["through"]["report"]


def test_loader_processes_with_copies_of_the_vectors_make_the_same_batches(outcomes: dict[str, Any]) -> None:
    assert outcomes["copies"]["losses"] == outcomes["through"]["losses"]
    assert outcomes["copies"]["report"] == outcomes["through"]["report"]


def test_searches_on_the_device_take_the_same_steps(outcomes: dict[str, Any]) -> None:
    through, device, changed = outcomes["through"], outcomes["device"], outcomes["changed"]
    assert device["losses"] == through["losses"] and device["report"] == through["report"]
    assert 0 < len(changed["losses"]) < len(through["losses"])
    assert changed["losses"] == through["losses"][-len(changed["losses"]) :]
    for of_run in (device, changed):
        for name, tensor in through["saved"].items():
            assert torch.equal(tensor, of_run["saved"][name]), name


def test_versions_are_copies_of_the_trained_tables_on_every_rank(outcomes: dict[str, Any]) -> None:
    steps = len(outcomes["through"]["losses"])
    numbers, same, sums = zip(*outcomes["versions"], strict=True)
    assert numbers == tuple(range(steps // 4 + 2)) and steps > 16
    assert all(same) and len(set(sums)) == len(sums)


def test_a_run_opened_again_searches_in_the_last_space(outcomes: dict[str, Any]) -> None:
    (report,) = outcomes["through"]["report"].values()
    for behaviour, metrics in outcomes["evaluated"].items():
        for name, value in metrics.items():
            assert report[behaviour][name] == pytest.approx(value, rel=1e-4), f"{behaviour} {name}"


def test_an_exported_model_searches_as_its_run(outcomes: dict[str, Any], tmp_path: Path) -> None:
    from launch.cli.main import main

    out = outcomes["out"]
    write_candidates(out / "world", tmp_path / "candidates.parquet")
    assert main(["export", str(out / "through"), str(tmp_path / "export")]) == 0
    tables = []
    for model in (out / "through", tmp_path / "export"):
        scores = tmp_path / f"{model.name}.parquet"
        assert main(["score", str(model), str(tmp_path / "candidates.parquet"), str(scores)]) == 0
        tables.append(pq.read_table(scores))
    for name in tables[0].column_names:
        np.testing.assert_allclose(*(table[name].to_numpy() for table in tables), rtol=1e-5, err_msg=name)
