"""Searches of a stream's histories on a device, on two ranks: the steps of the host's searches, also across a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nursery import Nursery
from trainer.data.simulator.write_dataset import simulate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(nursery: Nursery, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    nursery.compile_search()
    out: Path = tmp_path_factory.mktemp("stream-search")
    simulate(out / "world", users=100, days=2, partitions=4, seed=6)
    run_ranks("tests.distributed.stream_search_ranks", out, out / "world", timeout=600)
    found: dict[str, Any] = torch.load(out / "outcome.pt")
    return found


def test_both_take_the_same_steps(outcomes: dict[str, Any]) -> None:
    host, device = outcomes["cpu"], outcomes["device"]
    assert len(host["losses"]) > 10 and device["losses"] == host["losses"]
    assert device["report"] == host["report"] and device["trace"] == host["trace"]
    for name, tensor in host["saved"].items():
        assert torch.equal(tensor, device["saved"][name]), name


@pytest.mark.parametrize("change", ["cpu-device", "device-cpu"])
def test_a_run_stops_with_one_and_goes_on_with_the_other(outcomes: dict[str, Any], change: str) -> None:
    host, changed = outcomes["cpu"], outcomes[change]
    assert 0 < len(changed["losses"]) < len(host["losses"])
    assert changed["losses"] == host["losses"][-len(changed["losses"]) :]
    assert changed["report"] == host["report"]
    for name, tensor in host["saved"].items():
        assert torch.equal(tensor, changed["saved"][name]), name
