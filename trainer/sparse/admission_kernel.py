"""Admission of new ids to the rows of a dynamic table on a GPU, in Triton: one program works through one bucket.

A program is one warp, and a bucket of 64 places is two for each of its threads. It holds the bucket in registers, and
takes the bucket's new ids one after the other, as ``trainer/sparse/dynamic_id_kernel.py`` does on a CPU. Buckets are
independent, so the programs are too. The host waits for nothing, and needs no number of ids.

Worths are compared in float64, as on a CPU: a quotient of float32 would make ids equal that are not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POLICIES = {"recency": 0, "frequency": 1, "both": 2}
"""Numbers of the eviction policies in the kernel."""


@triton.jit(do_not_specialize=["total", "rows", "first_row", "step", "admit_after"])
def _admit(  # type: ignore[no-untyped-def]
    ids,
    buckets,
    stop_of,
    total,
    rows,
    first_row,
    step,
    admit_after,
    served_id,
    served_seen,
    served_sightings,
    candidate_id,
    candidate_seen,
    candidate_sightings,
    row_of,
    evicted_of,
    POLICY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Admit the new ids of the bucket whose first id is number ``program_id``; another program has nothing to do.

    One compilation serves every step: the numbers are not specialised.
    """
    begin = tl.program_id(0)
    bucket = tl.load(buckets + begin)
    before = tl.load(buckets + begin - 1, mask=begin > 0, other=-1)
    if (bucket < total) & (bucket != before):
        stop = tl.load(stop_of + begin).to(tl.int32)
        place = tl.arange(0, BLOCK)
        row = bucket * WIDTH + place
        # Row 0 serves all ids that have no row of their own, so no id may take it.
        inside = (place < WIDTH) & (row < rows) & (row + first_row > 0)
        id_of = tl.load(served_id + row, mask=inside, other=0)
        seen = tl.load(served_seen + row, mask=inside, other=0)
        sightings = tl.load(served_sightings + row, mask=inside, other=0)
        counted_id = tl.load(candidate_id + row, mask=inside, other=0)
        counted_seen = tl.load(candidate_seen + row, mask=inside, other=0)
        counted_sightings = tl.load(candidate_sightings + row, mask=inside, other=0)
        evicted = tl.full((), 0, tl.int64)
        for at in range(begin, stop):
            value = tl.load(ids + at)
            known = tl.min(tl.where(inside & (counted_id == value) & (counted_seen > 0), place, BLOCK), 0)
            count = tl.sum(tl.where(place == known, counted_sightings, 0), 0) + 1

            free = inside & (seen == 0)
            if POLICY == 0:
                worth, among_equals = seen.to(tl.float64), sightings.to(tl.float64)
            elif POLICY == 1:
                worth, among_equals = sightings.to(tl.float64), seen.to(tl.float64)
            else:
                worth = sightings.to(tl.float64) / (step - seen + 1).to(tl.float64)
                among_equals = seen.to(tl.float64)
            worth = tl.where(inside & (seen < step), worth, float("inf"))
            # A free row is taken before any other, and the first of them first.
            worth = tl.where(free, -1.0, worth)
            among_equals = tl.where(free, -1.0, among_equals)
            least = tl.min(worth, 0)
            tie = tl.min(tl.where(worth == least, among_equals, float("inf")), 0)
            chosen = tl.min(tl.where((worth == least) & (among_equals == tie), place, BLOCK), 0)
            # Any id that was not seen in this step is older than the new one.
            worth_it = least < float("inf") if POLICY == 0 else least <= count.to(tl.float64)
            admitted = worth_it & (count >= admit_after)
            evicted += (admitted & (least > 0)).to(tl.int64)
            tl.store(row_of + at, tl.where(admitted, bucket * WIDTH + chosen, -1))
            # BLOCK is no place: nothing is written.
            new = place == tl.where(admitted, chosen, BLOCK)
            id_of = tl.where(new, value, id_of)
            seen = tl.where(new, step, seen)
            sightings = tl.where(new, count, sightings)

            oldest_seen = tl.min(tl.where(inside, counted_seen, 0x7FFFFFFF), 0)
            oldest = tl.min(tl.where(inside & (counted_seen == oldest_seen), place, BLOCK), 0)
            counted_seen = tl.where(place == tl.where(admitted, known, BLOCK), 0, counted_seen)
            # If all candidates of the bucket were seen in this step, a new id is not counted.
            oldest = tl.where(oldest_seen == step, BLOCK, oldest)
            candidate = tl.where(known < BLOCK, known, oldest)
            counted = place == tl.where(admitted, BLOCK, candidate)
            counted_id = tl.where(counted, value, counted_id)
            counted_seen = tl.where(counted, step, counted_seen)
            counted_sightings = tl.where(counted, count, counted_sightings)
        tl.store(served_id + row, id_of, mask=inside)
        tl.store(served_seen + row, seen, mask=inside)
        tl.store(served_sightings + row, sightings, mask=inside)
        tl.store(candidate_id + row, counted_id, mask=inside)
        tl.store(candidate_seen + row, counted_seen, mask=inside)
        tl.store(candidate_sightings + row, counted_sightings, mask=inside)
        tl.store(evicted_of + begin, evicted)


def admit(
    ids: Tensor,
    buckets: Tensor,
    step: int,
    columns: tuple[Tensor, ...],
    *,
    rows: int,
    first_row: int,
    width: int,
    admit_after: int,
    evict: str,
) -> tuple[Tensor, Tensor]:
    """Give rows to the new ids of a step, and count those that get none; see ``DeviceIds``.

    Args:
        ids: ``[n]`` int64, n > 0, unique within a bucket.
        buckets: ``[n]`` int64, ascending; ids whose bucket is ``len(columns[0]) // width`` or more are not new.
        step: number of the training step.
        columns: id, step last seen and sightings of rows, then of candidates, ``[whole buckets]`` each; changed.
        rows: rows of the shard.
        first_row: its first row in the table.
        width: rows of a bucket.
        admit_after: number of sightings from which on an id may have a row.
        evict: eviction policy.

    Returns:
        ``[n]`` int64, the new row of each id, -1 if it got none or is not new; and the number of evicted ids, a scalar.
    """
    new, evicted = torch.full_like(ids, -1), torch.zeros_like(ids)
    _admit[(len(ids),)](
        ids,
        buckets,
        torch.searchsorted(buckets, buckets, right=True),
        len(columns[0]) // width,
        rows,
        first_row,
        step,
        admit_after,
        *columns,
        new,
        evicted,
        POLICY=POLICIES[evict],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )
    return new, evicted.sum()
