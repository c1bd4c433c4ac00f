"""Reference definition of the searches of ``modules/search/search.py``: slow, one row at a time in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modules.search.cpu_intrinsics import LANES
from modules.search.search import SearchPart, SearchResult


def scores(values: Tensor, query: Tensor) -> Tensor:
    """Return dot products ``[n]`` of ``values [n, width]`` and ``query [width]``: float32 of float16, int32 of int8."""
    if values.dtype == torch.int8:
        return (values.int() * query.int()).sum(1, dtype=torch.int32)
    products = (values.float() * query.float()).unflatten(1, (-1, LANES))
    lanes = torch.zeros(len(values), LANES)
    for block in products.unbind(1):
        lanes = lanes + block
    while lanes.shape[1] > 1:
        low, high = lanes.chunk(2, 1)
        lanes = low + high
    return lanes[:, 0]


def best(score: Tensor, length: int) -> Tensor:
    """Return the places of the ``length`` largest scores, ascending; of equal scores the later ones are taken."""
    from_the_end = score.flip(0).sort(descending=True, stable=True).indices[:length]
    return (len(score) - 1 - from_the_end).sort().values


def latest(first: np.ndarray, stop: np.ndarray, length: int) -> SearchResult:
    """Find the entries that :func:`modules.search.search.latest` finds."""
    return _rows([torch.arange(low, high)[-length:] for low, high in _runs(first, stop)])


def same_author(
    first: np.ndarray, stop: np.ndarray, length: int, author_id: np.ndarray, candidate_author: np.ndarray
) -> SearchResult:
    """Find the entries that :func:`modules.search.search.same_author` finds."""
    found = []
    for (low, high), author in zip(_runs(first, stop), candidate_author.tolist(), strict=True):
        same = torch.tensor(author_id[low:high]) == author
        found.append(low + same.nonzero()[:, 0][-length:])
    return _rows(found)


def latest_of_all(
    first: np.ndarray, stop: np.ndarray, length: int, ordinal: np.ndarray, bits: np.ndarray, require: int = 0
) -> SearchResult:
    """Find the entries that :func:`modules.search.search.latest_of_all` finds."""
    found = []
    for lows, highs in zip(first.tolist(), stop.tolist(), strict=True):
        at = torch.cat([torch.arange(low, max(low, high)) for low, high in zip(lows, highs, strict=True)])
        if require:
            at = at[(torch.tensor(bits)[at] & require) != 0]
        found.append(at[torch.tensor(ordinal)[at].argsort()][-length:])
    return _rows(found)


def top(first: np.ndarray, stop: np.ndarray, length: int, *parts: SearchPart) -> SearchResult:
    """Find the entries that :func:`modules.search.search.top` finds."""
    found = []
    for row, (low, high) in enumerate(_runs(first, stop)):
        score = None
        for column, candidate, vectors in parts:
            values = torch.tensor(vectors.values)
            entries = values[torch.from_numpy(vectors.rows(column[low:high]))]
            query = values[int(vectors.rows(candidate[row : row + 1])[0])]
            score = scores(entries, query) if score is None else score + scores(entries, query)
        assert score is not None
        found.append(low + best(score, length))
    return _rows(found)


def _runs(first: np.ndarray, stop: np.ndarray) -> list[tuple[int, int]]:
    """Return the bounds of each row's run."""
    return list(zip(first.tolist(), stop.tolist(), strict=True))


def _rows(found: list[Tensor]) -> SearchResult:
    """Join the places of all rows to one result."""
    at = torch.cat([torch.empty(0, dtype=torch.int64), *found])
    return SearchResult(at.numpy(), np.array([len(row) for row in found], np.int64))
