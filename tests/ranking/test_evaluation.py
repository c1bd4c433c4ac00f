"""Tests of predictions: the calibration curve, and ids that are newer than the model are counted in one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.features.packed_batch import BatchLayout
from trainer.data.loading.batch import RankingBatch, empty_batch
from trainer.ranking.evaluation import CALIBRATION_EDGES, Predictions, calibration_curve, predict
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
            predict=lambda batches: ((batch, torch.empty(0, 2)) for batch in batches),
            control=world.control,
            missing_vectors=lambda counts: {},
        )
        assert predict(engine, loader, quiet=True).probability.shape == (0, 2)
    lines = [line for line in caplog.messages if "unknown ids" in line]
    expected = ["evaluate: unknown ids: 6 of item, 12 of histories (direct ids beyond the rows of their tables; "]
    assert [line[: len(expected[0])] for line in lines] == (expected if new else [])


def test_the_calibration_curve_agrees_with_a_count_by_hand() -> None:
    random = np.random.default_rng(4)
    rows = 400
    probability = 10 ** random.uniform(-5, 0, (rows, 3))
    # Edges themselves, and both ends.
    probability[:23, 0] = [*CALIBRATION_EDGES, 0.0, 1.0]
    probability = probability.astype(np.float32)
    label = (random.random((rows, 3)) < 0.3).astype(np.float32)
    mask = (random.random((rows, 3)) < 0.8).astype(np.float32)
    mask[:, 2] = 0
    ids = torch.arange(rows)
    predictions = Predictions(ids, ids, ids, *map(torch.from_numpy, (probability, label, mask)))
    expected: dict[str, list[tuple[float, float, int]]] = {"click": [], "like": [], "gift": []}
    edges = [-np.inf, *CALIBRATION_EDGES, np.inf]
    for column, behaviour in enumerate(expected):
        for low, high in pairwise(edges):
            inside = [
                row
                for row in range(rows)
                if mask[row, column] and low < probability[row, column].astype(np.float64) <= high
            ]
            if inside:
                mean, share = probability[inside, column].astype(np.float64).mean(), label[inside, column].mean()
                expected[behaviour].append((mean, share, len(inside)))
    found = calibration_curve(predictions, list(expected), None)
    assert found.keys() == expected.keys() and len(found["click"]) > 15 and found["gift"] == []
    for behaviour, bins in expected.items():
        np.testing.assert_allclose(found[behaviour], bins, rtol=1e-6)
