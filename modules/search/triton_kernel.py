"""Search for the largest dot products on a GPU, in Triton. It is not wired into a job yet: only a test imports it.

Gather, dot product and selection are one kernel. A program has one candidate and reads its run block by block. Scores
stay in registers, as 64-bit keys of score and place; keys that are larger than the worst of the best so far are merged
into the list of the best by a sort. So 10,000 vectors are read once, and only the places of the best are written.

Scores equal those of ``modules/search/reference.py`` bit by bit: products of float16 values are exact in float32, so a
fused multiply-add rounds as an addition, and lanes are summed and joined in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 16
"""Same as in ``modules/search/cpu_intrinsics.py``, which is not imported because it needs numba."""

_FEWEST = 128
"""Smallest number of entries that are scored together; the list of the best has room for as many."""


@triton.jit
def _ordered(score):  # type: ignore[no-untyped-def]
    """Return float bits as an integer that is ordered like the float."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _halve(lanes, rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add lane ``l + width / 2`` to lane l: ``[rows, width]`` -> ``[rows, width / 2]``, one addition each."""
    halves = tl.permute(tl.reshape(lanes, (rows, 2, width // 2)), (0, 2, 1))
    low, high = tl.split(halves)
    return low + high


@triton.jit
def _top(  # type: ignore[no-untyped-def]
    first_of,
    stop_of,
    column,
    shift,
    vectors,
    rows,
    candidates,
    out,
    length,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Write the places of one row's best entries to ``out[row]``, -1 where there are fewer than ``length``."""
    row = tl.program_id(0)
    first, stop = tl.load(first_of + row), tl.load(stop_of + row)
    candidate = tl.load(candidates + row).to(tl.int64)
    lane = tl.arange(0, 16)
    place = tl.arange(0, KEPT)
    # Key 0 marks an empty place of the list: entries are counted from 1, so none has this key.
    best = tl.zeros((KEPT,), tl.int64)
    least = tl.full((), 0, tl.int64)
    for begin in range(0, stop - first, KEPT):
        here = begin + place
        inside = here < stop - first
        item = tl.load(column + first + here, mask=inside, other=-1 - shift).to(tl.int64) + shift
        item = tl.where((item > 0) & (item < rows), item, 0)
        lanes = tl.zeros((KEPT, 16), tl.int32 if BYTES else tl.float32)
        for block in tl.static_range(WIDTH // 16):
            values = tl.load(
                vectors + item[:, None] * WIDTH + block * 16 + lane[None, :], mask=inside[:, None], other=0
            )
            query = tl.load(vectors + candidate * WIDTH + block * 16 + lane)
            lanes += values.to(lanes.dtype) * query.to(lanes.dtype)[None, :]
        lanes = _halve(lanes, KEPT, 16)
        lanes = _halve(lanes, KEPT, 8)
        lanes = _halve(lanes, KEPT, 4)
        score = tl.reshape(_halve(lanes, KEPT, 2), (KEPT,))
        high = score.to(tl.int64) + 0x80000000 if BYTES else _ordered(score)
        # 32 bits of score, 31 of place: a signed key above 0.
        key = tl.where(inside, (high << 31) | (here + 1), 0)
        if tl.max(key, 0) > least:
            ordered = tl.sort(tl.reshape(tl.join(best, key), (2 * KEPT,)), descending=True)
            best, _ = tl.split(tl.permute(tl.reshape(ordered, (2, KEPT)), (1, 0)))
            least = tl.max(tl.where(place == length - 1, best, 0), 0)
    found = tl.where(best > 0, first + (best & 0x7FFFFFFF) - 1, -1)
    tl.store(out + row * length + place, found, mask=place < length)


def top(
    first: Tensor, stop: Tensor, length: int, column: Tensor, candidate: Tensor, vectors: Tensor, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """Find the entries of :func:`modules.search.search.top` for one part, on a GPU.

    Args:
        first: ``[n]`` int64, first place of each run.
        stop: ``[n]`` int64, place after the last one of each run; runs have less than 2^31 entries.
        length: largest number of entries of a row.
        column: column of the history, int64 or int32.
        candidate: ``[n]`` int64, ids of the candidates.
        vectors: ``[rows, width]`` float16 or int8, contiguous, width a multiple of 16.
        shift: see ``modules.search.search.SearchVectors``.

    Returns:
        ``at [lengths.sum()]`` and ``lengths [n]``, int64.

    Raises:
        ValueError: the vectors have a wrong type or width.
    """
    rows, width = vectors.shape
    if vectors.dtype not in (torch.float16, torch.int8) or width % LANES or not vectors.is_contiguous():
        raise ValueError(f"search vectors must be rows of float16 or int8, not {vectors.dtype} of width {width}")
    n = len(first)
    query = candidate + shift
    query = torch.where((query > 0) & (query < rows), query, 0)
    out = torch.empty(n, length, dtype=torch.int64, device=first.device)
    if n:
        kept = max(triton.next_power_of_2(length), _FEWEST)
        _top[(n,)](
            first,
            stop,
            column,
            shift,
            vectors,
            rows,
            query,
            out,
            length,
            WIDTH=width,
            KEPT=kept,
            BYTES=vectors.dtype == torch.int8,
        )
    ordered = out.sort(dim=1).values
    lengths = (stop - first).clamp(max=length)
    return ordered[ordered >= 0], lengths
