"""Random searches for the kernels that take tensors of a device, and the definition's answers to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from modules.search import reference
from modules.search.search import SearchPart, SearchVectors
from modules.search.tensor_search import DevicePart

Search = Callable[..., Tensor]


def random_parts(
    rng: np.random.Generator, parts: int, n: int, entries: int, dtype: type, ties: bool
) -> list[SearchPart]:
    """Return parts with tables of their own sizes and widths; some ids have no row, some rows no vector."""
    found = []
    for part in range(parts):
        rows, width, column_type = 300 + part, 16 * int(rng.integers(1, 6)), (np.int64, np.int32)[part]
        values = rng.integers(-1, 2, (rows, width)) if ties else rng.standard_normal((rows, width)) * 40
        values = values.clip(-128, 127).astype(dtype)
        values[0] = 0
        column = rng.integers(-1, rows + 3, entries).astype(column_type)
        found.append(SearchPart(column, rng.integers(-1, rows + 3, n), SearchVectors(values, shift=part)))
    return found


def random_runs(rng: np.random.Generator, entries: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return runs with fewer entries than asked for, with exactly as many, with one more, and with none."""
    first = rng.integers(0, entries + 1, 7)
    sizes = np.array([0, 1, length, length + 1, 1024, 1025, entries])
    first = np.minimum(first, np.maximum(entries - sizes, 0))
    return first, np.minimum(first + sizes, entries)


def found_by(
    search: Search,
    device: str,
    first: np.ndarray,
    stop: np.ndarray,
    length: int,
    parts: list[SearchPart],
    **options: int | None,
) -> list[list[int]]:
    """Run a search on NumPy arrays and return the places of each row."""
    tensors = [
        DevicePart(
            *(torch.from_numpy(array).to(device) for array in (part.column, part.candidate, part.vectors.values)),
            part.vectors.shift,
        )
        for part in parts
    ]
    places = search(*(torch.from_numpy(ends).to(device) for ends in (first, stop)), length, *tensors, **options).cpu()
    assert places.shape == (len(first), length)
    counts = (places >= 0).sum(1)
    assert all((row[count:] == -1).all() for row, count in zip(places, counts.tolist(), strict=True))
    return [row[:count].tolist() for row, count in zip(places, counts.tolist(), strict=True)]


def expected(first: np.ndarray, stop: np.ndarray, length: int, parts: list[SearchPart]) -> list[list[int]]:
    """Return the places of each row by definition."""
    at, lengths = reference.top(first, stop, length, *parts)
    return [row.tolist() for row in np.split(at, np.cumsum(lengths)[:-1])]
