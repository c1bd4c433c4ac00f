"""Attention and alignment of histories on one and two ranks, against one process with plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.aligned_model import STEPS, WAYS, PlainTraining, steps
from tests.distributed.test_engine import relative_error

TOLERANCE = 1e-5
"""Tolerance for float32, in units of the largest value."""


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_train_as_one_process_with_the_joined_batch(
    world: int, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("alignment")
    run_ranks("tests.distributed.alignment_ranks", out, ranks=world, timeout=600)
    outcome = torch.load(out / f"{world}.pt")
    wrong = {}
    for name, way in WAYS.items():
        plain = PlainTraining(way.clipping, way.alignment)
        losses, aligned = zip(*(plain.step(rows) for rows in steps()), strict=True)
        found = outcome[name]
        errors = {
            key: relative_error(found["parameters"][key], value.detach()) for key, value in plain.parameters().items()
        }
        errors["loss"] = relative_error(torch.tensor(found["losses"]), torch.tensor(losses))
        if way.alignment is None:
            assert found["aligned"] == [0.0] * STEPS
        else:
            errors["alignment"] = relative_error(torch.tensor(found["aligned"]), torch.tensor(aligned))
        wrong |= {f"{name}: {key}": error for key, error in errors.items() if not error <= TOLERANCE}
    assert not wrong
    assert all(outcome["stopped"])
    own_rows = outcome["own_rows"]
    assert len(own_rows) == world and all(len(of_rank) == STEPS for of_rank in own_rows)
    if world == 2:
        assert 0 in own_rows[1] and 0 not in own_rows[0]
        assert any(a != b for a, b in zip(*own_rows, strict=True))


def test_the_reference_is_moved_by_the_alignment_and_by_its_settings() -> None:
    """Without this the comparison above would prove little."""
    trained = {}
    for name in ("row_wise", "one way", "anchor detached", "not aligned"):
        plain = PlainTraining(0.0, WAYS[name].alignment)
        for rows in steps():
            plain.step(rows)
        trained[name] = plain.parameters()["item"]
    names = list(trained)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            assert relative_error(trained[first], trained[second]) > 100 * TOLERANCE, (first, second)
