"""Plan of a ranker's job on a described cluster."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modules.search.search import padded_width
from modules.table_set import TableSet
from trainer.checkpoint.run_directory import with_precision
from trainer.config.deepspeed import complete_settings, is_enabled
from trainer.config.features import MAX_TABLE_ROWS
from trainer.config.precision import dense_settings, resolve_precision
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.format.growing_history import MOST_PLACES
from trainer.data.format.schema import DatasetSpec
from trainer.engine.build_engine import rows_per_rank
from trainer.planning.accelerators import Cluster
from trainer.planning.dense_memory import ZeroSettings, dense_memory
from trainer.planning.exchange_traffic import RankTraffic, exchange_bytes, rank_traffic
from trainer.planning.ranker_model import RankerModel
from trainer.planning.step_time import StepTime, step_time
from trainer.planning.table_memory import RankTables, optimizer_bytes, rank_tables, table_bytes
from trainer.ranking.device_entries import entry_bytes
from trainer.ranking.device_histories import AUTO_SHARE, refusal
from trainer.ranking.growing_device_histories import places_for
from trainer.sparse.dynamic_ids import ID_BYTES
from trainer.sparse.planner import (
    RESERVED_SHARE,
    TableOptimizer,
    describe_plan,
    describe_topology,
    make_sharder,
    plan_tables,
)

RUNTIME_BYTES = {"cuda": 2 * 10**9, "cpu": 5 * 10**8}
"""Bytes of a process beside the job: context of CUDA, buffers of NCCL, libraries. An assumption."""

SNAPSHOT_DENSE = 12
"""Bytes of a network's weight in a snapshot: value and two moments in float32, whole on each rank."""

AVERAGE = 4
"""Bytes of a network's weight in the mean over time of ``stream.average_hours``, whole on each rank."""

LOADER_IDS_PER_S = 33_600_000
"""Ids that one core of a loader process prepares in a second: 77,500 rows of 434 ids in
benchmarks/results/loader.json."""

RANKER_MFU = 0.3
"""Share of the peak rate that the network's products reach: benchmarks/results/throughput.json has 0.26 to 0.55."""


@dataclass(frozen=True)
class Assumptions:
    """Properties of the data and of the machine that neither the job nor the dataset's description has.

    Attributes:
        fill: mean length of a history, as a share of its largest one.
        distinct: share of distinct ids among the ids of a rank in a step; None: as even draws would have it.
        mfu: share of the peak rate that products reach; None: the default of the kind of job.
    """

    fill: float = 1.0
    distinct: float | None = None
    mfu: float | None = None


def plan_ranker(
    config: JobConfig, spec: DatasetSpec, cluster: Cluster, assumed: Assumptions, rows: Mapping[str, int]
) -> dict[str, Any]:
    """Return the plan of a job as JSON: placement, memory, step time, problems and what would solve them.

    Args:
        config: the job.
        spec: description of its dataset.
        cluster: the cluster.
        assumed: what the job does not say.
        rows: table -> other number of rows than the dataset needs today.

    Raises:
        UserError: the job does not fit the dataset, or has a setting that no cluster accepts.
    """
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    world, figures, kind = cluster.gpus, cluster.accelerator, config.tables.optimizer
    batch = rows_per_rank(config, world)
    config = with_precision(config, resolve_precision(config.train, figures.device))
    settings = complete_settings(dense_settings(config.train), batch, world, origin=config.train.deepspeed)
    zero = ZeroSettings(settings.get("zero_optimization", {}).get("stage", 0), is_enabled(settings.get("bf16")))
    model = RankerModel.of(config, spec, rows)
    problems = _limits(model, spec, cluster)

    plan, refusal = _place(model, config, cluster, batch)
    if refusal:
        problems.append(refusal)
    of_tables = rank_tables(plan, kind, world)
    of_ids = _id_columns(plan, model, world)
    ids = model.table_ids(batch, assumed.fill, assumed.distinct)
    if not config.tables.deduplicate:
        ids = {name: of_table._replace(distinct=of_table.ids) for name, of_table in ids.items()}
    traffic = rank_traffic(plan, ids, world)
    cost = model.network_cost(batch, settings["gradient_accumulation_steps"], assumed.fill, bf16=zero.bf16)
    dense = dense_memory(model.parameters, model.parameters, world, zero)
    average = AVERAGE * model.parameters if config.averages else 0
    buffers = [
        exchange_bytes(of_rank, world, overlap=config.train.overlap, deduplicate=config.tables.deduplicate)
        for of_rank in traffic
    ]
    memory = [
        {
            "tables": of_rank.tables,
            "table optimizer": of_rank.optimizer,
            **({"dynamic ids": columns} if any(of_ids) else {}),
            "network": dense.weights + dense.gradients + average,
            "network optimizer": dense.optimizer,
            "activations": round(cost.peak_bytes),
            "exchange": round(of_exchange),
            "process": RUNTIME_BYTES[figures.device],
        }
        for of_rank, columns, of_exchange in zip(of_tables, of_ids, buffers, strict=True)
    ]
    host = [
        _host_memory(of_rank._replace(whole=of_rank.whole + columns), model, config)
        for of_rank, columns in zip(of_tables, of_ids, strict=True)
    ]
    searched = _searched_histories(model, config, spec, cluster, max(sum(of_rank.values()) for of_rank in memory))
    if searched:
        memory = [{**of_rank, "searched histories": searched} for of_rank in memory]
    if figures.device == "cpu":
        # A CPU has one memory.
        memory = [{**on_device, **on_host} for on_device, on_host in zip(memory, host, strict=True)]
        host = [{} for _ in host]

    totals = [sum(of_rank.values()) for of_rank in memory]
    fullest, emptiest = totals.index(max(totals)), totals.index(min(totals))
    mfu = RANKER_MFU if assumed.mfu is None else assumed.mfu

    def expected(of_plan: list[dict[str, Any]]) -> tuple[int, RankTraffic, StepTime]:
        exchanged = rank_traffic(of_plan, ids, world)
        busiest = max(range(world), key=lambda rank: exchanged[rank].served_bytes + exchanged[rank].rows_in)
        return (
            busiest,
            exchanged[busiest],
            step_time(
                exchanged[busiest],
                len({(table["dim"], table["sharding"]) for table in of_plan}),
                cost,
                cluster,
                state_share=_state_share(kind, max(table["dim"] for table in of_plan)),
                reduced_bytes=(2 if zero.bf16 else 4) * model.parameters,
                bf16=zero.bf16,
                mfu=mfu,
                overlap=config.train.overlap,
            ),
        )

    busiest, busy, time = expected(plan)
    rate = world * batch / time.seconds
    ids_per_row = sum(of_table.ids for of_table in ids.values()) / batch
    document: dict[str, Any] = {
        "kind": "train",
        "cluster": cluster.model_dump(),
        "rows_per_rank": batch,
        "tables": [
            {**table, "ids_per_step": ids[table["table"]].ids, "distinct_ids_per_step": ids[table["table"]].distinct}
            for table in plan
        ],
        "network_parameters": model.parameters,
        "memory": {
            "capacity": figures.memory_bytes,
            "fullest_rank": fullest,
            "fullest": memory[fullest],
            "fullest_total": totals[fullest],
            "emptiest_rank": emptiest,
            "emptiest_total": totals[emptiest],
        },
        "host_memory": _fullest_host(host, figures.host_bytes),
        "step": {
            "seconds": time.seconds,
            "parts": time.parts,
            "hidden_ids_seconds": time.hidden,
            "bottleneck": time.bottleneck,
            "rows_per_second": rate,
            "busiest_rank": busiest,
            "bytes_out": {name: getattr(busy, name) for name in ("ids_out", "rows_out", "rows_in")},
            "flops": cost.flops,
            "operations": cost.operations,
            "loader_cores_per_host": math.ceil(rate * ids_per_row / LOADER_IDS_PER_S / cluster.hosts),
        },
        "assumptions": {
            "fill": assumed.fill,
            "distinct": "even draws" if assumed.distinct is None else assumed.distinct,
            "mfu": mfu,
            "ids": "spread evenly over the rows of a table" + (", dynamic tables full" if any(of_ids) else ""),
        },
    }
    free = figures.memory_bytes - (totals[fullest] - memory[fullest]["tables"] - memory[fullest]["table optimizer"])
    if totals[fullest] > figures.memory_bytes:
        problems.append(
            f"rank {fullest} needs {_gb(totals[fullest])} GB, and its memory has {_gb(figures.memory_bytes)} GB"
        )
    if document["host_memory"]["total"] > figures.host_bytes:
        problems.append(
            f"rank {document['host_memory']['rank']} needs {_gb(document['host_memory']['total'])} GB of host memory, "
            f"and its share has {_gb(figures.host_bytes)} GB"
        )
    document["problems"] = problems
    document["faster"] = _faster(plan, time, lambda changed: expected(changed)[2], world)
    short = bool(refusal) or totals[fullest] > figures.memory_bytes
    document["remedies"] = _remedies(model, config, cluster, batch, memory[fullest], free) if short else []
    return document


def _place(
    model: RankerModel, config: JobConfig, cluster: Cluster, batch: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Return TorchRec's plan of the tables; if there is none, an even one by rows, and the planner's reason."""
    optimizer = TableOptimizer(config.tables.optimizer, config.tables.learning_rate, config.tables.eps)
    figures = cluster.accelerator
    topology = describe_topology(
        cluster.gpus,
        cluster.per_host,
        figures.device,
        host_bytes=(figures.host_bytes if figures.device == "cuda" else figures.memory_bytes) * cluster.per_host,
        device_bytes=figures.memory_bytes if figures.device == "cuda" else None,
    )
    tables = TableSet(model.tables, model.features.lookups, device="meta")
    sharder = make_sharder(optimizer, index_dedup=config.tables.deduplicate and figures.device == "cuda")
    try:
        return describe_plan(plan_tables(tables, sharder, optimizer, topology, batch_size=batch), model.tables), None
    except UserError as error:
        return [_by_rows(table.name, table.rows, table.dim, cluster.gpus) for table in model.tables], str(error)


def _by_rows(name: str, rows: int, dim: int, world: int) -> dict[str, Any]:
    """Return a table that is cut evenly by rows."""
    block = -(-rows // world)
    shards = [[max(0, min(block, rows - block * rank)), dim] for rank in range(world)]
    return {
        "table": name,
        "rows": rows,
        "dim": dim,
        "module": "",
        "sharding": "row_wise",
        "kernel": "fused",
        "ranks": list(range(world)),
        "shards": shards,
    }


def _faster(
    plan: list[dict[str, Any]], time: StepTime, expected: Callable[[list[dict[str, Any]]], StepTime], world: int
) -> list[dict[str, Any]]:
    """Return tables whose ids all meet at one rank, where cutting them by rows would save a twentieth of a step."""
    found = []
    for table in plan:
        if world == 1 or table["sharding"] != "table_wise":
            continue
        even = _by_rows(table["table"], table["rows"], table["dim"], world)
        changed = expected([even if other is table else other for other in plan])
        if changed.seconds < 0.95 * time.seconds:
            change = f"features.{table['table']}.sharding = 'row_wise'"
            found.append({"change": change, "seconds": changed.seconds, "bottleneck": changed.bottleneck})
    return sorted(found, key=lambda change: change["seconds"])


def _limits(model: RankerModel, spec: DatasetSpec, cluster: Cluster) -> list[str]:
    """Return the limits of Limelight itself that the plan exceeds."""
    found = []
    if cluster.gpus > spec.partitions:
        found.append(
            f"{cluster.gpus} ranks, and the dataset has {spec.partitions} partitions, each of one rank: import it "
            f"again with --partitions {cluster.gpus} or more"
        )
    for table in model.tables:
        if table.rows > MAX_TABLE_ROWS:
            found.append(
                f"table {table.name}: {table.rows:,} rows; a job accepts {MAX_TABLE_ROWS:,}, since 32 bits of an id's "
                "hash choose its row"
            )
    return found


def _id_columns(plan: list[dict[str, Any]], model: RankerModel, world: int) -> list[int]:
    """Return the bytes of the ids of dynamic tables on each rank."""
    dynamic = {table.name for table in model.tables if table.dynamic}
    columns = [0] * world
    for table in plan:
        for rank, (rows, _) in zip(table["ranks"], table["shards"], strict=True):
            columns[rank] += ID_BYTES * rows * (table["table"] in dynamic)
    return columns


def _searched_histories(model: RankerModel, config: JobConfig, spec: DatasetSpec, cluster: Cluster, other: int) -> int:
    """Return the bytes of the histories and search vectors of a rank whose device searches; 0 if the loader searches.

    Args:
        model: the model.
        config: the job.
        spec: description of the dataset. Each exposure may be a visit of a history, and every rank has as many. Those
            of a stream are counted with the largest number of places that each may take.
        cluster: the cluster.
        other: bytes of the other parts of the fullest rank, for a job that lets the free memory decide.
    """
    search, figures = config.features.search, cluster.accelerator
    automatic = search.device == "auto"
    if not model.features.needs_space or search.device == "cpu" or refusal(config):
        return 0
    vectors = sum(table.rows * padded_width(table.dim) for table in model.tables if table.name in search.tables)
    places = math.ceil(spec.exposures / cluster.gpus)
    if config.stream is not None:
        places = places_for(MOST_PLACES * places)
    needed = places * entry_bytes(model.features) + vectors * np.dtype(search.dtype).itemsize
    if automatic and (figures.device == "cpu" or needed > AUTO_SHARE * (figures.memory_bytes - other)):
        return 0
    return needed


def _host_memory(of_rank: RankTables, model: RankerModel, config: JobConfig) -> dict[str, int]:
    """Return what one rank needs in host memory."""
    weight = SNAPSHOT_DENSE + (AVERAGE if config.averages else 0)
    snapshot = of_rank.whole + weight * model.parameters if config.checkpoint.background else 0
    return {"tables in host memory": of_rank.host, "checkpoint snapshot": snapshot}


def _fullest_host(host: list[dict[str, int]], capacity: int) -> dict[str, Any]:
    """Return the host memory of the rank that needs most of it."""
    totals = [sum(of_rank.values()) for of_rank in host]
    rank = totals.index(max(totals))
    return {"capacity": capacity, "rank": rank, "parts": host[rank], "total": totals[rank]}


def _state_share(kind: Any, dim: int) -> float:
    """Return the bytes of the optimizer's state for each byte of a row."""
    return optimizer_bytes(kind, 1, dim) / table_bytes(1, dim)


def _remedies(
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


def _gb(size: float) -> str:
    """Return a size in gigabytes."""
    return f"{size / 1e9:,.1f}"
