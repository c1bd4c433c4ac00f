"""Memory of embedding tables and of their optimizer on each rank, from a plan of the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

FLOAT = 4
"""Bytes of a float32."""

OptimizerKind = Literal["sgd", "adagrad", "rowwise_adagrad"]

CACHE_SHARE = 0.2
"""Share of a table in host memory that TorchRec caches on the GPU (``fused_uvm_caching``)."""


class RankTables(NamedTuple):
    """Bytes of one rank's shards.

    Attributes:
        tables: values on the device, with the caches of tables in host memory.
        optimizer: state of the optimizer on the device.
        host: values and states in host memory.
        whole: values and states, wherever they are; a checkpoint's snapshot copies these.
    """

    tables: int
    optimizer: int
    host: int
    whole: int


def table_bytes(rows: int, dim: int) -> int:
    """Return the bytes of float32 values: ``4 rows dim``."""
    return FLOAT * rows * dim


def optimizer_bytes(kind: OptimizerKind, rows: int, dim: int) -> int:
    """Return the bytes of the optimizer's state of a shard.

    ``sgd`` keeps none, ``rowwise_adagrad`` one float32 for each row, ``adagrad`` one for each element.
    """
    return FLOAT * rows * {"sgd": 0, "rowwise_adagrad": 1, "adagrad": dim}[kind]


def rank_tables(plan: Sequence[Mapping[str, Any]], kind: OptimizerKind, world: int) -> list[RankTables]:
    """Return the bytes of each rank.

    Args:
        plan: plan of :func:`trainer.sparse.planner.describe_plan`.
        kind: optimizer of the tables.
        world: number of ranks.
    """
    tables, optimizer, host, whole = ([0] * world for _ in range(4))
    for table in plan:
        for rank, (rows, dim) in zip(table["ranks"], table["shards"], strict=True):
            values, state = table_bytes(rows, dim), optimizer_bytes(kind, rows, dim)
            whole[rank] += values + state
            if table["kernel"] == "fused":
                tables[rank] += values
                optimizer[rank] += state
                continue
            host[rank] += values + state
            if table["kernel"] == "fused_uvm_caching":
                tables[rank] += round(CACHE_SHARE * values)
    return [RankTables(*of_rank) for of_rank in zip(tables, optimizer, host, whole, strict=True)]
