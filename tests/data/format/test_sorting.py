"""Stable sorting against numpy's stable argsort."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.format.sorting import first_of_each, stable_order, time_order

SPREADS = {"constant": 1, "many ties": 7, "times": 10**12, "all of int64": 2**62}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_stable_order_is_a_stable_argsort(spread, n):
    keys = np.random.default_rng(n).integers(-spread, spread, n)
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64])
def test_stable_order_takes_any_integer_type(dtype):
    limits = np.iinfo(dtype)
    keys = np.array([limits.max, limits.min, 3, limits.min, limits.max, 2], dtype)
    np.testing.assert_array_equal(stable_order(keys), [1, 3, 5, 2, 0, 4])


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
def test_time_order_breaks_ties(spread):
    rng = np.random.default_rng(5)
    time, tie = rng.integers(0, spread, 500), rng.permutation(500)
    np.testing.assert_array_equal(time_order(time, tie), np.lexsort((tie, time)))


def test_first_of_each_keeps_the_first():
    a, b = np.array([1, 2, 1, 1, 2]), np.array([0, 0, 0, 1, 0])
    assert first_of_each([a, b]).tolist() == [0, 1, 3]
