"""Tests of ``BucketSearch`` against ``np.searchsorted``."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.simulator.exposure import BucketSearch


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
@pytest.mark.parametrize("step", [0.3, 1.0, 17.0, 5_000.0])
def test_bucket_search_equals_bisection(dtype, step):
    rng = np.random.default_rng(int(step))
    # crowds, gaps and equal values
    column = np.sort(np.concatenate([[0], rng.integers(0, 60, 40), 900 * rng.random(50)])).astype(dtype)
    values = np.concatenate([column, np.arange(1_000), 1_000 * rng.random(500), [1_000]]).astype(dtype)
    found = BucketSearch(column, step, 1_000).search(values.reshape(-1, 1))[:, 0]
    np.testing.assert_array_equal(found, np.searchsorted(column, values, side="right"))
