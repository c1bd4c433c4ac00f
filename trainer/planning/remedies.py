"""Changes that would make a ranker's job fit its cluster, each alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.config.ranker import JobConfig
from trainer.planning.accelerators import Cluster
from trainer.planning.ranker_model import RankerModel
from trainer.planning.table_memory import optimizer_bytes, table_bytes
from trainer.sparse.planner import RESERVED_SHARE


def find_remedies(
    model: RankerModel, config: JobConfig, cluster: Cluster, batch: int, memory: Mapping[str, int], free: int
) -> list[dict[str, Any]]:
    """Return changes, each alone, and whether the job fits after it, if the tables are spread evenly.

    Args:
        model: the model.
        config: the job.
        cluster: the cluster.
        batch: rows of a rank in a step.
        memory: parts of the fullest rank.
        free: bytes of that rank without its tables.
    """
    world, figures, kind = cluster.gpus, cluster.accelerator, config.tables.optimizer
    values = sum(table_bytes(table.rows, table.dim) for table in model.tables)
    states = sum(optimizer_bytes(kind, table.rows, table.dim) for table in model.tables)
    planner = (1 - RESERVED_SHARE) * figures.memory_bytes
    room = min(free, planner)
    found = []

    def add(change: str, needed: float, available: float) -> None:
        found.append({"change": change, "fits": needed <= available, "needs": round(needed), "has": round(available)})

    add("features.*.sharding = 'row_wise' for all tables", (values + states) / world, room)
    if kind == "adagrad":
        add("tables.optimizer = 'sgd' and 'column_wise', without states", values / world, room)
        smaller = sum(optimizer_bytes("rowwise_adagrad", table.rows, table.dim) for table in model.tables)
        add("tables.optimizer = 'rowwise_adagrad'", (values + smaller) / world, room)
    elif kind == "sgd":
        add("features.*.sharding = 'column_wise' for the largest table", values / world, room)
    if figures.device == "cuda":
        snapshot = (values + states) / world if config.checkpoint.background else 0
        host = (1 - RESERVED_SHARE) * figures.host_bytes
        add("tables in host memory behind a cache (fused_uvm_caching)", (values + states) / world + snapshot, host)
        if snapshot:
            add("the same with checkpoint.background = false", (values + states) / world, host)
    add("tables in half precision (Limelight's are float32 today)", (values / 2 + states) / world, room)
    if room > 0:
        hosts = math.ceil((values + states) / room / cluster.per_host)
        add(f"--hosts {hosts} --gpus {hosts * cluster.per_host}", (values + states) / (hosts * cluster.per_host), room)
    per_row = (memory["activations"] + memory["exchange"]) / batch
    spare = figures.memory_bytes - sum(memory.values()) + per_row * batch
    # Not all of it is proportional to the rows.
    if 0 < spare < per_row * batch and (fewer := int(0.98 * spare / per_row)):
        add(f"train.batch_size = {fewer * world} ({fewer:,} rows a rank)", per_row * fewer, spare)
    return found
