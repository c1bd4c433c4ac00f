"""Tests of predictions: ids that are newer than the model are counted in one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.data.features.packed_batch import BatchLayout
from trainer.data.loading.batch import RankingBatch, empty_batch
from trainer.ranking.evaluation import predict
from trainer.runtime.distributed import World


@pytest.mark.parametrize("new", [0, 3])
def test_ids_beyond_the_tables_are_said_once(caplog: pytest.LogCaptureFixture, new: int) -> None:
    empty = empty_batch(BatchLayout((), 0, 2))
    batches = [replace(empty, beyond={"item": new, "histories": 2 * new} if new else {}) for _ in range(2)]

    class Loader:
        rows_total = 0

        def __iter__(self) -> Iterator[RankingBatch]:
            return iter(batches)

    loader: Any = Loader()
    with World.join("cpu") as world, caplog.at_level("INFO"):
        engine: Any = SimpleNamespace(
            predict=lambda batches: ((batch, torch.empty(0, 2)) for batch in batches), control=world.control
        )
        assert predict(engine, loader, quiet=True).probability.shape == (0, 2)
    lines = [line for line in caplog.messages if "unknown ids" in line]
    expected = ["evaluate: unknown ids: 6 of item, 12 of histories (direct ids beyond the rows of their tables; "]
    assert [line[: len(expected[0])] for line in lines] == (expected if new else [])
