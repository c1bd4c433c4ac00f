"""The GPU's search against its definition in plain PyTorch, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modules import gsu_reference
from modules.gsu import SearchPart, SearchVectors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length", [1, 7, 100, 300])
@pytest.mark.parametrize("seed", range(3))
def test_the_gpu_finds_the_same(dtype: type, ties: bool, length: int, seed: int) -> None:
    from modules import gsu_triton

    rng = np.random.default_rng(seed)
    n, entries, rows, width = 9, 4000, 300, 16 * int(rng.integers(1, 6))
    values = rng.integers(-1, 2, (rows, width)) if ties else rng.standard_normal((rows, width)) * 40
    values = values.clip(-128, 127).astype(dtype)
    values[0] = 0
    first = rng.integers(0, entries + 1, n)
    stop = np.minimum(first + rng.choice([0, 1, 3, entries], n), entries)
    column, candidate = rng.integers(-1, rows + 3, entries), rng.integers(-1, rows + 3, n)
    expected = gsu_reference.top(first, stop, length, SearchPart(column, candidate, SearchVectors(values, shift=1)))
    arrays = (torch.from_numpy(array).cuda() for array in (first, stop))
    more = (torch.from_numpy(array).cuda() for array in (column, candidate, values))
    at, lengths = gsu_triton.top(*arrays, length, *more, shift=1)
    np.testing.assert_array_equal(lengths.cpu().numpy(), expected.lengths)
    np.testing.assert_array_equal(at.cpu().numpy(), expected.at)
