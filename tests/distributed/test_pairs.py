"""In-batch softmax with negatives from all ranks, on one and two ranks, against one process with plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.pairs_model import PAIR_WAYS, PlainPairTraining, steps
from tests.distributed.test_engine import relative_error

TOLERANCE = 1e-5
"""Tolerance for float32, in units of the largest value."""


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_train_as_one_process_with_the_joined_batch(
    world: int, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("pairs")
    run_ranks("tests.distributed.pairs_ranks", out, ranks=world)
    outcome = torch.load(out / f"{world}.pt")
    rows = [len(pairs.dense) for pairs in steps()]
    wrong = {}
    for name, way in PAIR_WAYS.items():
        plain = PlainPairTraining(way.clipping)
        losses = [plain.step(pairs) for pairs in steps()]
        found = outcome[name]
        errors = {key: relative_error(found["parameters"][key], value) for key, value in plain.parameters().items()}
        errors["loss"] = relative_error(torch.tensor(found["losses"]), torch.tensor(losses))
        wrong |= {f"{name}: {key}": error for key, error in errors.items() if not error <= TOLERANCE}
        assert found["rows"] == rows
        batches = [world] * (len(rows) - 1) + [1]
        assert found["left_out"] == [2 * n + of_ranks for n, of_ranks in zip(rows, batches, strict=True)]
    assert not wrong


def test_negatives_of_the_other_rank_move_the_reference() -> None:
    """Without this the comparison above would prove little: a rank with its own negatives only learns otherwise."""
    joined, halves = PlainPairTraining(0.0), PlainPairTraining(0.0)
    pairs = steps()[0]
    n = len(pairs.dense)
    joined.step(pairs)
    for start, stop in ((0, n // 2), (n // 2, n)):
        part = type(pairs)(
            {name: rows[start:stop] for name, rows in pairs.ids.items()},
            *(getattr(pairs, name)[start:stop] for name in ("dense", "user_id", "author_id", "log_q")),
        )
        halves.step(part)
    assert relative_error(joined.parameters()["author"], halves.parameters()["author"]) > 100 * TOLERANCE
