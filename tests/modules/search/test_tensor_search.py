"""Search in PyTorch's operations against its definition, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from modules.search import tensor_search
from modules.search.search import SearchPart, SearchVectors
from tests.modules.search.device_parts import expected, found_by, random_parts, random_runs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
ENTRIES = 2100


@pytest.fixture(params=DEVICES)
def search(request: pytest.FixtureRequest) -> Callable[..., list[list[int]]]:
    return partial(found_by, tensor_search.top, request.param)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length", [1, 100, 1000])
def test_the_entries_are_those_of_the_definition(
    search: Callable, parts: int, dtype: type, ties: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng([length, parts, ties])
    first, stop = random_runs(rng, ENTRIES, length)
    random = random_parts(rng, parts, 7, ENTRIES, dtype, ties)
    found = expected(first, stop, length, random)
    longest = int((stop - first).max())
    assert search(first, stop, length, random, longest=longest) == found
    # In parts of one row, and with a bound that no run reaches.
    monkeypatch.setattr(tensor_search, "CHUNK_VALUES", 1)
    assert search(first, stop, length, random, longest=longest + 9) == found


def test_of_equal_scores_the_latest_are_taken(search: Callable) -> None:
    first, stop = np.array([3, 3]), np.array([1500, 1900])
    parts = [SearchPart(np.full(2000, 1), np.array([1, 0]), SearchVectors(np.ones((2, 16), np.int8)))]
    assert search(first, stop, 5, parts, longest=1897) == [list(range(1495, 1500)), list(range(1895, 1900))]


def test_no_rows_and_empty_runs(search: Callable) -> None:
    parts = random_parts(np.random.default_rng(1), 1, 2, 10, np.float16, ties=False)
    # The second run begins behind the last entry.
    for longest in (0, 4):
        assert search(np.array([4, 10]), np.array([4, 10]), 3, parts, longest=longest) == [[], []]
    none = [part._replace(candidate=part.candidate[:0]) for part in parts]
    assert search(np.empty(0, np.int64), np.empty(0, np.int64), 3, none, longest=0) == []


def test_wrong_vectors_are_refused(search: Callable) -> None:
    first, stop = np.array([0]), np.array([4])
    (part,) = random_parts(np.random.default_rng(2), 1, 1, 4, np.float16, ties=False)
    for values in (np.zeros((9, 24), np.float16), np.zeros((9, 16), np.float32)):
        with pytest.raises(ValueError, match="rows of float16 or int8"):
            search(first, stop, 1, [part._replace(vectors=SearchVectors(values))], longest=4)
    with pytest.raises(ValueError, match="one or two parts of one type, not 3 of 1"):
        search(first, stop, 1, [part] * 3, longest=4)
