"""Search for the largest dot products on a GPU, in Triton; ``tensor_search.py`` has the same in PyTorch's operations.

Two kernels, neither of which sorts:

* ``_score`` reads the vectors of the runs and writes one 32-bit key for each entry, ordered like its score. All blocks
  of all runs are programs of their own, so a long run keeps the whole GPU busy.
* ``_select`` finds the key of the last entry to take, digit by digit from histograms of 256 bins, and then writes the
  places of the larger keys and of the latest equal ones. The keys are 4 bytes where a vector has 128, and stay in the
  second-level cache.

Scores equal those of ``modules/search/reference.py`` bit by bit: products of float16 values are exact in float32, so a
fused multiply-add rounds as an addition, and lanes are summed and joined in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.search.tensor_search import DevicePart, check_parts

SCORED = 128
"""Entries that one program of ``_score`` reads: one for each of its threads."""

SELECTED = 1024
"""Entries that ``_select`` reads at a time."""

KEY_BYTES = 1 << 26
"""Largest memory of the keys; larger batches are searched in several parts. Small enough for second-level caches."""


@triton.jit
def _joined(low, high, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add ``low`` and ``high``, the lanes of each entry ``[entries, WIDTH]``, and then their halves, down to one."""
    lanes = low + high
    if WIDTH == 1:
        joined = tl.reshape(lanes, (lanes.shape[0],))
    else:
        halves = tl.permute(tl.reshape(lanes, (lanes.shape[0], 2, WIDTH // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        joined = _joined(first, second, WIDTH // 2)
    return joined


@triton.jit
def _dots(  # type: ignore[no-untyped-def]
    column,
    shift,
    vectors,
    rows,
    query,
    at,
    inside,
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Return the dot products of the entries at the places ``at`` with row ``query``."""
    item = tl.load(column + at, mask=inside, other=0).to(tl.int64) + shift
    item = tl.where((item > 0) & (item < rows), item, 0)
    # Lanes 0 to 7 and 8 to 15 apart: a thread has all of an entry's lanes, and joins them without other threads. Each
    # thread reads the query, all from the same addresses, so that nothing goes through shared memory.
    lane = tl.arange(0, 8)[None, :]
    entry = vectors + item[:, None] * WIDTH + lane
    candidate = vectors + tl.broadcast_to(query, item.shape)[:, None] * WIDTH + lane
    low = tl.zeros((at.shape[0], 8), tl.int32 if BYTES else tl.float32)
    high = tl.zeros((at.shape[0], 8), tl.int32 if BYTES else tl.float32)
    for block in tl.static_range(WIDTH // 16):
        for half in tl.static_range(2):
            offset = block * 16 + half * 8
            value = tl.load(entry + offset, mask=inside[:, None], other=0).to(low.dtype)
            product = value * tl.load(candidate + offset).to(low.dtype)
            if half == 0:
                low += product
            else:
                high += product
    return _joined(low, high, 8)


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    first_of,
    stop_of,
    column,
    shift,
    vectors,
    rows,
    queries,
    column_2,
    shift_2,
    vectors_2,
    rows_2,
    queries_2,
    keys,
    longest,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the keys of a block of one run to ``keys[row]``: uint32, ordered like the scores."""
    row = tl.program_id(0)
    first, stop = tl.load(first_of + row), tl.load(stop_of + row)
    here = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = here < stop - first
    if tl.program_id(1) * BLOCK < stop - first:
        query = tl.load(queries + row).to(tl.int64)
        score = _dots(column, shift, vectors, rows, query, first + here, inside, WIDTH, BYTES)
        if PARTS == 2:
            query_2 = tl.load(queries_2 + row).to(tl.int64)
            score += _dots(column_2, shift_2, vectors_2, rows_2, query_2, first + here, inside, WIDTH_2, BYTES)
        if BYTES:
            key = score
        else:
            # Negative floats are ordered against their bits.
            bits = score.to(tl.int32, bitcast=True)
            key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        # The sign bit turned: order of unsigned integers.
        tl.store(keys + row.to(tl.int64) * longest + here, key ^ -0x80000000, mask=inside)


@triton.jit
def _select(first_of, stop_of, keys, longest, out, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the places of one row's largest keys to ``out[row]``, ascending; of equal keys the latest are taken."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(first_of + row)
    count = (tl.load(stop_of + row) - first).to(tl.int32)
    place, digits = tl.arange(0, BLOCK), tl.arange(0, 256)
    start = keys + row * longest
    # After each pass: the leading digits of the last key to take, the number of keys that begin with them, and how many
    # of these are to be taken.
    leading = tl.full((), 0, tl.uint32)
    equal = count
    wanted = tl.minimum(count, length)
    for step in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for begin in range(0, count, BLOCK):
            inside = begin + place < count
            key = tl.load(start + begin + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
            if step > 0:
                inside &= (key >> (32 - 8 * step)) == leading
            counts += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=inside)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        equal = tl.sum(tl.where(digits == digit, counts, 0), 0)
        leading = (leading << 8) | digit.to(tl.uint32)
    earlier = equal - wanted
    seen = tl.full((), 0, tl.int32)
    written = tl.full((), 0, tl.int32)
    for begin in range(0, count, BLOCK):
        inside = begin + place < count
        key = tl.load(start + begin + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
        same = inside & (key == leading)
        taken = inside & ((key > leading) | (same & (seen + tl.cumsum(same.to(tl.int32), 0) > earlier)))
        position = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(out + row * length + position, first + begin + place, mask=taken)
        seen += tl.sum(same.to(tl.int32), 0)
        written += tl.sum(taken.to(tl.int32), 0)


def top(first: Tensor, stop: Tensor, length: int, *parts: DevicePart, longest: int | None = None) -> Tensor:
    """Find the entries of :func:`modules.search.search.top`, on a GPU.

    Args:
        first: ``[n]`` int64, first place of each run.
        stop: ``[n]`` int64, place after the last one of each run; runs have less than 2^31 entries.
        length: largest number of entries of a row.
        parts: one part, or two whose dot products are added. The vectors of both have the same type.
        longest: number of entries of the longest run, or more. Without it the host waits for the device to count them.

    Returns:
        ``[n, length]`` int64: the places of each row, ascending, then -1 where a row has fewer than ``length``.

    Raises:
        ValueError: the vectors have a wrong type or width, or there are more than two parts.
    """
    check_parts(parts)
    tables, queries = [_table(part) for part in parts], [part.rows(part.candidate) for part in parts]
    out = torch.full((len(first), length), -1, dtype=torch.int64, device=first.device)
    if not len(first):
        return out
    if longest is None:
        longest = int((stop - first).max())
    if not longest:
        return out
    # Triton compiles a kernel for multiples of 16 and another one for other numbers: one is enough.
    longest = -(-longest // 16) * 16
    rows = max(1, KEY_BYTES // (4 * longest))
    keys = torch.empty(min(rows, len(first)), longest, dtype=torch.int32, device=first.device)
    for begin in range(0, len(first), rows):
        part = slice(begin, begin + rows)
        n = len(first[part])
        _score[(n, triton.cdiv(longest, SCORED))](
            first[part],
            stop[part],
            *tables[0],
            queries[0][part],
            # Of a search with one part the kernel does not read these.
            *tables[-1],
            queries[-1][part],
            keys,
            longest,
            PARTS=len(parts),
            WIDTH=parts[0].vectors.shape[1],
            WIDTH_2=parts[-1].vectors.shape[1],
            BYTES=parts[0].vectors.dtype == torch.int8,
            BLOCK=SCORED,
        )
        _select[(n,)](first[part], stop[part], keys, longest, out[part], length, BLOCK=SELECTED)
    return out


def _table(part: DevicePart) -> tuple[Tensor, int, Tensor, int]:
    """Return column, shift, vectors and the number of their rows."""
    return part.column, part.shift, part.vectors, len(part.vectors)
