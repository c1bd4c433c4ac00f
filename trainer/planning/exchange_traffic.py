"""Ids and rows that the ranks exchange in one step: numbers, bytes, and the memory that they need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainer.planning.row_spread import EVEN, RowSpread
from trainer.planning.table_memory import FLOAT

ID = 8
"""Bytes of an id."""

PLACE = 4
"""Bytes of an id's place among the distinct ids."""


class TableIds(NamedTuple):
    """Ids of one table that one rank reads in a step.

    Attributes:
        ids: all ids.
        distinct: ids that are sent; all of them without deduplication.
        spread: how the ids that are sent fall on the rows of the table.
    """

    ids: float
    distinct: float
    spread: RowSpread = EVEN


class RankTraffic(NamedTuple):
    """Exchange of one rank in one step.

    Attributes:
        ids: ids that this rank reads.
        distinct: ids that it sends to their owners, itself included.
        served: ids that it gets from all ranks, itself included.
        ids_out, ids_in: bytes of ids to other ranks and from them.
        rows_out, rows_in: bytes of rows to other ranks and from them; gradients flow the opposite way.
        read_bytes: bytes of the rows at all places of this rank's ids.
        own_bytes: bytes of the rows of its distinct ids.
        served_bytes: bytes of the rows that it looks up for all ranks.
        uncached_bytes: part of ``served_bytes`` whose tables lie in host memory.
        sorted_bytes: part of ``own_bytes`` of tables that are cut by rows, which arrives sorted by owner.
    """

    ids: float
    distinct: float
    served: float
    ids_out: float
    ids_in: float
    rows_out: float
    rows_in: float
    read_bytes: float
    own_bytes: float
    served_bytes: float
    uncached_bytes: float
    sorted_bytes: float


def expected_distinct(ids: float, rows: int) -> float:
    """Return the expected number of distinct ids among ``ids`` that are drawn evenly from ``rows``.

    It is ``R (1 - (1 - 1/R)^n)``. Popular ids occur more often, which only makes the number smaller: this is the
    largest expectation that independent draws can have.
    """
    if rows <= 1:
        return min(ids, rows)
    return -rows * math.expm1(ids * math.log1p(-1 / rows))


def rank_traffic(plan: Sequence[Mapping[str, Any]], ids: Mapping[str, TableIds], world: int) -> list[RankTraffic]:
    """Return the exchange of each rank.

    A rank sends each of its ``n`` distinct ids of a table to the rank that owns the row, so the owner of rows to which
    a share ``f`` of the ids falls gets ``f n`` ids from each of the ``W`` ranks. A table that is cut by columns sends
    every id to the owner of each part.

    Args:
        plan: plan of :func:`trainer.sparse.planner.describe_plan`.
        ids: table -> ids that each rank reads.
        world: number of ranks.
    """
    sums = [[0.0] * len(RankTraffic._fields) for _ in range(world)]
    at = {name: place for place, name in enumerate(RankTraffic._fields)}
    for table in plan:
        of_table, dim = ids[table["table"]], table["dim"]
        # Rank -> ids and bytes of rows that it serves to each rank.
        owned: dict[int, tuple[float, float]] = {}
        for rank, columns, share in owned_shares(table, of_table.spread):
            served = of_table.distinct * share
            before = owned.get(rank, (0.0, 0.0))
            owned[rank] = before[0] + served, before[1] + served * FLOAT * columns
        sent = sum(count for count, _ in owned.values())
        returned = sum(size for _, size in owned.values())
        cut = table["sharding"] == "row_wise" and world > 1
        for rank, total in enumerate(sums):
            own_ids, own_rows = owned.get(rank, (0.0, 0.0))
            for name, value in (
                ("ids", of_table.ids),
                ("distinct", sent),
                ("served", world * own_ids),
                ("ids_out", ID * (sent - own_ids)),
                ("ids_in", ID * (world - 1) * own_ids),
                ("rows_out", (world - 1) * own_rows),
                ("rows_in", returned - own_rows),
                ("read_bytes", FLOAT * dim * of_table.ids),
                ("own_bytes", returned),
                ("served_bytes", world * own_rows),
                ("uncached_bytes", world * own_rows if table["kernel"] != "fused" else 0.0),
                ("sorted_bytes", returned if cut else 0.0),
            ):
                total[at[name]] += value
    return [RankTraffic(*total) for total in sums]


def owned_shares(table: Mapping[str, Any], spread: RowSpread) -> list[tuple[int, int, float]]:
    """Return rank, columns, and share of the sent ids of each shard of a table.

    Args:
        table: entry of a plan.
        spread: how the ids fall on the rows.
    """
    found, first = [], 0
    for rank, (rows, columns) in zip(table["ranks"], table["shards"], strict=True):
        # Shards by rows follow each other; all others have every row.
        begin = first if table["sharding"] == "row_wise" else 0
        found.append((rank, columns, spread.between(begin / table["rows"], (begin + rows) / table["rows"])))
        first += rows
    return found


def exchange_bytes(traffic: RankTraffic, world: int, *, overlap: bool, deduplicate: bool = True) -> float:
    """Return the memory that one rank needs for the exchange of a step, at its peak: when gradients are exchanged.

    Ids: those of the batch, the sorted and the distinct ones, those that were received, and the place of each id; twice
    if the ids of the next batch travel meanwhile. Rows: of the ids that this rank serves the rows and the gradients;
    the rows at all places, which are the network's inputs; and three buffers of the size of its distinct ids: the rows
    as they were received, the sums of the gradients, and the gradients as they are sent. The gradients at all places
    belong to the network's activations.

    Without deduplication no sums are needed, and the received rows are the inputs, unless the table is cut by rows and
    they are sorted once more. On one rank nothing is sent or received, and with deduplication each place reads its row
    from the table, so there are the inputs and the sums of the gradients only.

    Args:
        traffic: exchange of this rank.
        world: number of ranks.
        overlap: the ids of the next batch travel during a step.
        deduplicate: each id is sent once.
    """
    of_ids = ID * (traffic.ids + 2 * traffic.distinct + traffic.served) + deduplicate * PLACE * traffic.ids
    if deduplicate and world == 1:
        return (1 + overlap) * of_ids + traffic.read_bytes + traffic.own_bytes
    of_rows = 2 * traffic.served_bytes
    if deduplicate:
        of_rows += traffic.read_bytes + 3 * traffic.own_bytes
    elif world > 1:
        of_rows += traffic.read_bytes + traffic.own_bytes + traffic.sorted_bytes
    return (1 + overlap) * of_ids + of_rows
