"""Plans of tables for tests, in the form of trainer.sparse.planner.describe_plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def even_plan(
    sizes: Sequence[tuple[int, int]], world: int, sharding: str, kernel: str = "fused"
) -> list[dict[str, Any]]:
    """Return a plan of tables ``t0``, ``t1``, ... of the given rows and widths, spread as evenly as they can be."""
    plan = []
    for number, (rows, dim) in enumerate(sizes):
        ranks, shards = [number % world], [[rows, dim]]
        if sharding == "row_wise":
            block = -(-rows // world)
            ranks = list(range(world))
            shards = [[max(0, min(rows, block * (rank + 1)) - block * rank), dim] for rank in ranks]
        elif sharding == "column_wise":
            parts = max(n for n in range(1, world + 1) if dim % n == 0)
            ranks, shards = list(range(parts)), [[rows, dim // parts]] * parts
        plan.append(
            {
                "table": f"t{number}",
                "rows": rows,
                "dim": dim,
                "sharding": sharding,
                "kernel": kernel,
                "ranks": ranks,
                "shards": shards,
            }
        )
    return plan
