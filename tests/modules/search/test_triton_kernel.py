"""GPU search against its definition in plain PyTorch, entry by entry, and its compilation for GPUs.

``make test-triton`` runs them without a GPU: the kernels run in Triton's interpreter, and are compiled ahead of time,
since the interpreter cannot see what the compiler refuses.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.search.search import SearchPart, SearchVectors
from tests.kernel_compilation import compiled_kernels
from tests.modules.search.device_parts import expected, found_by, random_parts, random_runs

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, ENTRIES = ("cuda", 5000) if GPU and not INTERPRETED else ("cpu", 2100)
LENGTHS = (1, 100, 128, 129, 300, 1000)

pytestmark = [
    *([pytest.mark.gpu] if GPU else []),
    pytest.mark.skipif(
        not importlib.util.find_spec("triton") or not (GPU or INTERPRETED),
        reason="needs Triton, and a GPU or its interpreter: run `make test-triton`",
    ),
]


@pytest.fixture
def search() -> Callable[..., list[list[int]]]:
    """Run the GPU search on NumPy arrays and return the places of each row."""
    from modules.search import triton_kernel

    return partial(found_by, triton_kernel.top, DEVICE)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_gpu_finds_the_same(search: Callable, parts: int, dtype: type, ties: bool, length: int) -> None:
    rng = np.random.default_rng([length, parts, ties])
    first, stop = random_runs(rng, ENTRIES, length)
    random = random_parts(rng, parts, 7, ENTRIES, dtype, ties)
    assert search(first, stop, length, random) == expected(first, stop, length, random)


def test_of_equal_scores_the_latest_are_taken(search: Callable) -> None:
    first, stop = np.array([3, 3]), np.array([1500, 1900])
    column, candidate = np.full(2000, 1), np.array([1, 0])
    parts = [SearchPart(column, candidate, SearchVectors(np.ones((2, 16), np.int8)))]
    assert search(first, stop, 5, parts) == [list(range(1495, 1500)), list(range(1895, 1900))]


def test_a_batch_beyond_the_memory_of_the_keys_is_searched_in_parts(
    search: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modules.search import triton_kernel

    monkeypatch.setattr(triton_kernel, "KEY_BYTES", 4 * 50 * 3)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 200, 10)
    stop = first + rng.integers(0, 51, 10)
    parts = random_parts(rng, 2, 10, 250, np.float16, ties=False)
    assert search(first, stop, 8, parts, longest=50) == expected(first, stop, 8, parts)
    # Larger than any run: the host then needs no answer of the device.
    assert search(first, stop, 8, parts, longest=1000) == expected(first, stop, 8, parts)


def test_no_rows_and_empty_runs(search: Callable) -> None:
    parts = random_parts(np.random.default_rng(1), 1, 2, 10, np.float16, ties=False)
    assert search(np.array([4, 9]), np.array([4, 9]), 3, parts) == [[], []]
    none = [part._replace(candidate=part.candidate[:0]) for part in parts]
    assert search(np.empty(0, np.int64), np.empty(0, np.int64), 3, none) == []


def test_wrong_vectors_are_refused(search: Callable) -> None:
    first, stop = np.array([0]), np.array([4])
    (part,) = random_parts(np.random.default_rng(2), 1, 1, 4, np.float16, ties=False)
    for values in (np.zeros((9, 24), np.float16), np.zeros((9, 16), np.float32)):
        with pytest.raises(ValueError, match="rows of float16 or int8"):
            search(first, stop, 1, [part._replace(vectors=SearchVectors(values))])
    with pytest.raises(ValueError, match="one or two parts of one type, not 3 of 1"):
        search(first, stop, 1, [part] * 3)


def test_the_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    kernels = compiled_kernels("tests.modules.search.triton_compilation", tmp_path)
    assert [kernel["kernel"] for kernel in kernels].count("_select") == 2
    scores = [kernel for kernel in kernels if kernel["kernel"] == "_score"]
    assert {(kernel["capability"], kernel["PARTS"], kernel["BYTES"]) for kernel in scores} == {
        (capability, parts, byte) for capability in (80, 90) for parts in (1, 2) for byte in (0, 1)
    }
    for kernel in scores:
        blocks = kernel["WIDTH"] // 16 + (kernel["WIDTH_2"] // 16 if kernel["PARTS"] == 2 else 0)
        # Half a block of 16 lanes is one load, of an entry and of the candidate, and nothing is exchanged by threads.
        assert kernel["wide_loads"] >= 4 * blocks, kernel
        assert kernel["shared"] == 0 and kernel["cubin"] > 0, kernel
