"""One and two ranks train as one process with plain PyTorch does, in every combination that the engine accepts."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from combinations import COMBINATIONS
from small_model import PlainTraining, steps

TOLERANCE = 1e-5


@cache
def plain(optimizer: str, clipping: float) -> tuple[list[float], dict[str, torch.Tensor], int]:
    training = PlainTraining(optimizer, clipping)
    losses = [training.step(rows) for rows in steps()]
    return losses, training.parameters(), training.clipped


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the largest value: values near zero are differences of larger ones."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("world", [1, 2])
def test_engine_agrees_with_plain_training(world: int, run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(HERE / "engine_ranks.py", tmp_path, ranks=world, timeout=300)
    outcomes = torch.load(tmp_path / f"{world}.pt")
    assert len(outcomes) == len(COMBINATIONS)
    report = {}
    for combination in COMBINATIONS:
        outcome = outcomes[str(combination)]
        losses, parameters, clipped = plain(combination.optimizer, combination.clipping)
        assert outcome["rows"] == [len(rows) for rows in steps()]
        if combination.clipping:
            assert 0 < clipped < len(losses), "some steps must be clipped and some not"
        assert outcome["parameters"].keys() == parameters.keys()
        errors = {name: relative_error(outcome["parameters"][name], parameters[name]) for name in parameters}
        errors["losses"] = relative_error(torch.tensor(outcome["losses"]), torch.tensor(losses))
        report[str(combination)] = errors
        if combination.sharding != "auto":
            assert {table["sharding"] for table in outcome["plan"]} == {combination.sharding}
    wrong = {
        combination: {name: error for name, error in errors.items() if not error <= TOLERANCE}
        for combination, errors in report.items()
    }
    assert not any(wrong.values()), {combination: names for combination, names in wrong.items() if names}
