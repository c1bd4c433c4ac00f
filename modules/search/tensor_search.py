"""The dot-product search over tensors of one device, in PyTorch's operations: for devices without a compiled search.

It finds the entries that ``modules/search/reference.py`` defines, bit by bit, for many rows at a time. The number of
entries of each row is known without the search, ``min(stop - first, length)``, so the host never waits for a result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16
"""Same as in ``modules/search/cpu_intrinsics.py``, which is not imported because it needs numba."""

CHUNK_VALUES = 1 << 22
"""Largest number of values of vectors that are read at a time; larger batches are searched in several parts."""


class DevicePart(NamedTuple):
    """One part of a score, as :class:`modules.search.search.SearchPart`, with tensors of one device.

    Attributes:
        column: column of the history, int64 or int32: ids of its entries.
        candidate: ``[n]`` int64, ids of the candidates.
        vectors: ``[rows, width]`` float16 or int8, contiguous, width a multiple of 16; row 0 is zeros.
        shift: added to the id in a history to get its row.
    """

    column: Tensor
    candidate: Tensor
    vectors: Tensor
    shift: int = 0

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of some ids, int64; 0 for ids outside the table."""
        rows = ids.long() + self.shift
        return torch.where((rows > 0) & (rows < len(self.vectors)), rows, 0)


def check_parts(parts: tuple[DevicePart, ...]) -> None:
    """Check the parts of a search.

    Raises:
        ValueError: the vectors have a wrong type or width, or there are more than two parts.
    """
    dtypes = {part.vectors.dtype for part in parts}
    if len(parts) not in (1, 2) or len(dtypes) > 1:
        raise ValueError(f"a search has one or two parts of one type, not {len(parts)} of {len(dtypes)}")
    for part in parts:
        vectors, width = part.vectors, part.vectors.shape[1]
        if vectors.dtype not in (torch.float16, torch.int8) or width % LANES or not vectors.is_contiguous():
            raise ValueError(f"search vectors must be rows of float16 or int8, not {vectors.dtype} of width {width}")


def top(first: Tensor, stop: Tensor, length: int, *parts: DevicePart, longest: int) -> Tensor:
    """Find the entries of :func:`modules.search.search.top`, on the device of the tensors.

    Args:
        first: ``[n]`` int64, first place of each run.
        stop: ``[n]`` int64, place after the last one of each run; runs have less than 2^31 entries.
        length: largest number of entries of a row.
        parts: one part, or two whose dot products are added. The vectors of both have the same type.
        longest: number of entries of the longest run, or more.

    Returns:
        ``[n, length]`` int64: the places of each row, ascending, then -1 where a row has fewer than ``length``.

    Raises:
        ValueError: the vectors have a wrong type or width, or there are more than two parts.
    """
    check_parts(parts)
    out = torch.full((len(first), length), -1, dtype=torch.int64, device=first.device)
    if not longest:
        return out
    values = longest * max(part.vectors.shape[1] for part in parts)
    rows = max(1, CHUNK_VALUES // values)
    for begin in range(0, len(first), rows):
        chunk = slice(begin, begin + rows)
        own = [part._replace(candidate=part.candidate[chunk]) for part in parts]
        found = _top_of_chunk(first[chunk], stop[chunk], length, own, longest)
        out[chunk, : found.shape[1]] = found
    return out


def _top_of_chunk(first: Tensor, stop: Tensor, length: int, parts: list[DevicePart], longest: int) -> Tensor:
    """Return the places ``[n, min(length, longest)]`` of some rows; see :func:`top`."""
    within = torch.arange(longest, device=first.device)
    inside = within < (stop - first)[:, None]
    # Places behind a run are read at its first one; an empty run has none, and its place may be behind the column.
    at = torch.where(inside, first[:, None] + within, 0)
    score = _scores(parts[0], at)
    for part in parts[1:]:
        score = score + _scores(part, at)
    keys = (_ordered(score) << 32) + within
    keys = torch.where(inside, keys, torch.iinfo(torch.int64).min)
    best, _ = keys.topk(min(length, longest), dim=1)
    found = best > torch.iinfo(torch.int64).min
    places = torch.where(found, first[:, None] + (best & 0xFFFFFFFF), torch.iinfo(torch.int64).max).sort(dim=1).values
    return torch.where(places < torch.iinfo(torch.int64).max, places, -1)


def _scores(part: DevicePart, at: Tensor) -> Tensor:
    """Return the dot products ``[n, entries]`` of the entries at ``at`` with each row's candidate.

    They are summed in the order of :func:`modules.search.reference.scores`.
    """
    values = part.vectors[part.rows(part.column[at])]
    query = part.vectors[part.rows(part.candidate)][:, None]
    if values.dtype == torch.int8:
        return (values.int() * query.int()).sum(2, dtype=torch.int32)
    products = (values.float() * query.float()).unflatten(2, (-1, LANES))
    lanes = torch.zeros_like(products[:, :, 0])
    for block in products.unbind(2):
        lanes = lanes + block
    while lanes.shape[2] > 1:
        low, high = lanes.chunk(2, 2)
        lanes = low + high
    return lanes[:, :, 0]


def _ordered(score: Tensor) -> Tensor:
    """Return integers, int64, in the order of the scores."""
    if score.dtype == torch.int32:
        return score.long()
    # Negative floats are ordered against their bits.
    bits = score.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
