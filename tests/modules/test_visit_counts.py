"""Counts of past visits against their definition, one visit at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modules.visit_counts import UNIT, count_visits

BEHAVIOURS = 3


def runs(rng: np.random.Generator, rows: int, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random runs for each row, some of them empty."""
    ends = np.sort(rng.integers(0, entries + 1, (rows, 2, 2)), axis=2)
    return ends[..., 0].copy(), ends[..., 1].copy()


def by_definition(first, stop, as_of_ms, known_ms, bits, half_life_ms, column, candidate) -> np.ndarray:
    found = np.zeros((len(first), 1 + BEHAVIOURS))
    for row in range(len(first)):
        for low, high in zip(first[row], stop[row], strict=True):
            for at in range(low, high):
                if column is not None and column[at] != candidate[row]:
                    continue
                weight = 2.0 ** (-(as_of_ms[row] - known_ms[at]) / half_life_ms) if half_life_ms else 1.0
                found[row, 0] += weight
                for k in range(BEHAVIOURS):
                    found[row, 1 + k] += weight * (int(bits[at]) >> k & 1)
    return found


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("half_life_ms", [0.0, 5.0, 700.0])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_the_definition(seed: int, half_life_ms: float, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    known_ms = np.sort(rng.integers(0, 1000, 60))
    # More behaviours happened than are counted.
    bits = rng.integers(0, 2 ** (BEHAVIOURS + 2), 60).astype(np.int32)
    first, stop = runs(rng, 40, 60)
    as_of_ms = 1000 + rng.integers(1, 50, 40)
    column, candidate = rng.integers(0, 4, 60).astype(dtype), rng.integers(0, 4, 40).astype(dtype)
    for of_column, of_candidate in ((None, None), (column, candidate)):
        arguments = first, stop, as_of_ms, known_ms, bits
        found = count_visits(*arguments, BEHAVIOURS, half_life_ms, of_column, of_candidate)
        expected = by_definition(*arguments, half_life_ms, of_column, of_candidate)
        assert found.dtype == np.float32 and found.shape == (40, 1 + BEHAVIOURS)
        # The weight of each of at most 120 visits is rounded to a multiple of 2^-20.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0 if not half_life_ms else 120 / 2 / UNIT)
        assert (found[:, 1:] <= found[:, :1]).all() and (expected[:, 0] > 0).sum() > 10


def test_counts_do_not_depend_on_the_order_of_visits_that_end_together() -> None:
    rng = np.random.default_rng(4)
    known_ms = np.repeat([10, 500, 900], 20)
    bits = rng.integers(0, 8, 60).astype(np.int32)
    order = np.concatenate([begin + rng.permutation(20) for begin in (0, 20, 40)])
    first, stop, as_of_ms = np.zeros((1, 1), np.int64), np.full((1, 1), 60), np.array([1001])
    found = [count_visits(first, stop, as_of_ms, known_ms, of_visits, 3, 77.0) for of_visits in (bits, bits[order])]
    assert np.array_equal(*found) and not np.array_equal(bits, bits[order])


def test_threads_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    known_ms, bits = np.sort(rng.integers(0, 1000, 500)), rng.integers(0, 8, 500).astype(np.int32)
    first, stop = runs(rng, 300, 500)
    arguments = first, stop, np.full(300, 1001), known_ms, bits, 3, 100.0
    alone = count_visits(*arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    np.testing.assert_array_equal(count_visits(*arguments), alone)


def test_no_rows_and_no_visits() -> None:
    nothing, no_bits = np.zeros(0, np.int64), np.zeros(0, np.int32)
    found = count_visits(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64), nothing, nothing, no_bits, 2)
    assert found.shape == (0, 3)
    empty = np.zeros((4, 1), np.int64)
    assert not count_visits(empty, empty, np.arange(4), nothing, no_bits, 2, 1.0).any()
