"""The definition of the searches of ``modules/search/search.py``: one row at a time in plain PyTorch, and slow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modules.search.cpu_intrinsics import LANES
from modules.search.search import Found, SearchPart


def scores(values: Tensor, query: Tensor) -> Tensor:
    """Dot products of ``values [n, width]`` with ``query [width]``, both float16 or both int8; float32 or int32."""
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
    """Places of the ``length`` largest scores, ascending; of equal ones the later are taken."""
    from_the_end = score.flip(0).sort(descending=True, stable=True).indices[:length]
    return (len(score) - 1 - from_the_end).sort().values


def latest(first: np.ndarray, stop: np.ndarray, length: int) -> Found:
    """See :func:`modules.search.search.latest`."""
    return _rows([torch.arange(low, high)[-length:] for low, high in _runs(first, stop)])


def same_author(
    first: np.ndarray, stop: np.ndarray, length: int, author_id: np.ndarray, candidate_author: np.ndarray
) -> Found:
    """See :func:`modules.search.search.same_author`."""
    found = []
    for (low, high), author in zip(_runs(first, stop), candidate_author.tolist(), strict=True):
        same = torch.tensor(author_id[low:high]) == author
        found.append(low + same.nonzero()[:, 0][-length:])
    return _rows(found)


def latest_of_all(
    first: np.ndarray, stop: np.ndarray, length: int, ordinal: np.ndarray, bits: np.ndarray, require: int = 0
) -> Found:
    """See :func:`modules.search.search.latest_of_all`."""
    found = []
    for lows, highs in zip(first.tolist(), stop.tolist(), strict=True):
        at = torch.cat([torch.arange(low, max(low, high)) for low, high in zip(lows, highs, strict=True)])
        if require:
            at = at[(torch.tensor(bits)[at] & require) != 0]
        found.append(at[torch.tensor(ordinal)[at].argsort()][-length:])
    return _rows(found)


def top(first: np.ndarray, stop: np.ndarray, length: int, *parts: SearchPart) -> Found:
    """See :func:`modules.search.search.top`."""
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
    return list(zip(first.tolist(), stop.tolist(), strict=True))


def _rows(found: list[Tensor]) -> Found:
    at = torch.cat([torch.empty(0, dtype=torch.int64), *found])
    return Found(at.numpy(), np.array([len(row) for row in found], np.int64))
