"""GPU search against its definition in plain PyTorch, entry by entry.

Without a GPU the kernel runs in Triton's interpreter, if Triton is installed, which takes minutes instead of seconds.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

from modules.search import reference
from modules.search.search import SearchPart, SearchVectors

GPU = torch.cuda.is_available()
DEVICE, ENTRIES, SEEDS = ("cuda", 4000, 3) if GPU else ("cpu", 600, 1)

pytestmark = [
    pytest.mark.gpu if GPU else pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: pip install triton"),
]


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length", [1, 7, 100, 300] if GPU else [1, 100])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_gpu_finds_the_same(dtype: type, ties: bool, length: int, seed: int) -> None:
    if not GPU:
        # Read when Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from modules.search import triton_kernel

    rng = np.random.default_rng(seed)
    n, entries, rows, width = 9, ENTRIES, 300, 16 * int(rng.integers(1, 6))
    values = rng.integers(-1, 2, (rows, width)) if ties else rng.standard_normal((rows, width)) * 40
    values = values.clip(-128, 127).astype(dtype)
    values[0] = 0
    first = rng.integers(0, entries + 1, n)
    stop = np.minimum(first + rng.choice([0, 1, 3, entries], n), entries)
    column, candidate = rng.integers(-1, rows + 3, entries), rng.integers(-1, rows + 3, n)
    expected = reference.top(first, stop, length, SearchPart(column, candidate, SearchVectors(values, shift=1)))
    arrays = (torch.from_numpy(array).to(DEVICE) for array in (first, stop))
    more = (torch.from_numpy(array).to(DEVICE) for array in (column, candidate, values))
    at, lengths = triton_kernel.top(*arrays, length, *more, shift=1)
    np.testing.assert_array_equal(lengths.cpu().numpy(), expected.lengths)
    np.testing.assert_array_equal(at.cpu().numpy(), expected.at)
