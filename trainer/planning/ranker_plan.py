"""Plan of a ranker's job on a described cluster."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modules.table_set import TableSet
from trainer.checkpoint.run_directory import with_precision
from trainer.config.deepspeed import complete_settings, is_enabled
from trainer.config.features import MAX_TABLE_ROWS
from trainer.config.precision import dense_settings, resolve_precision
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.engine.build_engine import rows_per_rank
from trainer.planning.accelerators import Cluster
from trainer.planning.counted_ids import CountedIds
from trainer.planning.dense_memory import ZeroSettings, dense_memory
from trainer.planning.exchange_traffic import (
    RankTraffic,
    TableIds,
    exchange_bytes,
    owned_shares,
    rank_traffic,
)
from trainer.planning.rank_memory import (
    AVERAGE,
    batches_ahead,
    fullest_host,
    host_memory,
    id_columns,
    orders_of_histories,
    searched_histories,
)
from trainer.planning.ranker_model import RankerModel
from trainer.planning.remedies import find_remedies
from trainer.planning.step_time import StepTime, step_time
from trainer.planning.table_memory import optimizer_bytes, rank_tables, table_bytes
from trainer.sparse.planner import (
    TableOptimizer,
    describe_plan,
    describe_topology,
    make_sharder,
    plan_tables,
)

RUNTIME_BYTES = {"cuda": 2 * 10**9, "cpu": 5 * 10**8}
"""Bytes of a process beside the job: context of CUDA, buffers of NCCL, libraries. An assumption."""

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
        distinct: share of distinct ids among the ids of a rank in a step; None: as independent draws would have it.
        zipf: exponent of Zipf's law by which users, authors and items are drawn; None: evenly.
        mfu: share of the peak rate that products reach; None: the default of the kind of job.
    """

    fill: float = 1.0
    distinct: float | None = None
    mfu: float | None = None
    zipf: float | None = None


def plan_ranker(
    config: JobConfig,
    spec: DatasetSpec,
    cluster: Cluster,
    assumed: Assumptions,
    rows: Mapping[str, int],
    counted: CountedIds | None = None,
) -> dict[str, Any]:
    """Return the plan of a job as JSON: placement, memory, step time, problems and what would solve them.

    Args:
        config: the job.
        spec: description of its dataset.
        cluster: the cluster.
        assumed: what the job does not say.
        rows: table -> other number of rows than the dataset needs today.
        counted: ids of a rank's step in the dataset, in place of what is assumed about them.

    Raises:
        UserError: the job does not fit the dataset, or has a setting that no cluster accepts.
    """
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    world, figures, kind = cluster.gpus, cluster.accelerator, config.tables.optimizer
    batch = rows_per_rank(config, world)
    if counted is not None:
        assumed = replace(assumed, fill=counted.fill)
    config = with_precision(config, resolve_precision(config.train, figures.device))
    settings = complete_settings(dense_settings(config.train), batch, world, origin=config.train.deepspeed)
    zero = ZeroSettings(settings.get("zero_optimization", {}).get("stage", 0), is_enabled(settings.get("bf16")))
    model = RankerModel.of(config, spec, rows)
    problems = _limits(model, spec, cluster)

    plan, refusal = _place(model, config, cluster, batch)
    if refusal:
        problems.append(refusal)
    of_tables = rank_tables(plan, kind, world)
    of_ids = id_columns(plan, model, world)
    ids = model.table_ids(batch, assumed.fill, assumed.distinct, assumed.zipf, deduplicate=config.tables.deduplicate)
    if counted is not None:
        ids = counted.tables
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

    read = sum(of_table.ids for of_table in ids.values())
    busiest, busy, time = expected(plan)
    rate = world * batch / time.seconds
    cores = math.ceil(rate * read / batch / LOADER_IDS_PER_S / cluster.hosts)
    batches = batches_ahead(model, config, batch, read, workers=math.ceil(cores / cluster.per_host))
    host = [
        host_memory(of_rank._replace(whole=of_rank.whole + columns), model, config, batches)
        for of_rank, columns in zip(of_tables, of_ids, strict=True)
    ]
    searched = searched_histories(model, config, spec, cluster, max(sum(of_rank.values()) for of_rank in memory))
    if searched:
        memory = [{**of_rank, "searched histories": searched} for of_rank in memory]
        if orders := orders_of_histories(model, config, spec, cluster):
            host = [{**of_rank, "orders of histories": orders} for of_rank in host]
    if figures.device == "cpu":
        # A CPU has one memory.
        memory = [{**on_device, **on_host} for on_device, on_host in zip(memory, host, strict=True)]
        host = [{} for _ in host]

    totals = [sum(of_rank.values()) for of_rank in memory]
    fullest, emptiest = totals.index(max(totals)), totals.index(min(totals))
    document: dict[str, Any] = {
        "kind": "train",
        "cluster": cluster.model_dump(),
        "rows_per_rank": batch,
        "tables": [
            {
                **table,
                "ids_per_step": ids[table["table"]].ids,
                "distinct_ids_per_step": ids[table["table"]].distinct,
                "share_of_busiest_rank": _busiest_share(table, ids[table["table"]]),
            }
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
        "host_memory": fullest_host(host, figures.host_bytes),
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
            "loader_cores_per_host": cores,
        },
        "assumptions": {
            "fill": assumed.fill,
            **_id_assumptions(assumed, counted),
            "mfu": mfu,
            **({"dynamic tables": "full"} if any(of_ids) else {}),
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
    document["remedies"] = find_remedies(model, config, cluster, batch, memory[fullest], free) if short else []
    return document


def _busiest_share(table: Mapping[str, Any], ids: TableIds) -> float:
    """Return the largest share of a table's sent ids that one rank gets."""
    shares: dict[int, float] = {}
    for rank, columns, share in owned_shares(table, ids.spread):
        shares[rank] = shares.get(rank, 0.0) + share * columns / table["dim"]
    return max(shares.values())


def _id_assumptions(assumed: Assumptions, counted: CountedIds | None) -> dict[str, Any]:
    """Return what the plan says about the distribution of ids, and what is known of its error."""
    if counted is not None:
        return {"ids": f"counted in {counted.rows:,} rows of the dataset"}
    if assumed.zipf is not None:
        return {"ids": f"Zipf's law with exponent {assumed.zipf:g}, popular ids side by side where ids have an order"}
    if assumed.distinct is not None:
        return {"distinct": assumed.distinct, "ids": "spread evenly over the rows of a table"}
    return {"ids": "even draws, the most distinct ids; the busiest owner may have more (--zipf, --count-ids)"}


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


def _state_share(kind: Any, dim: int) -> float:
    """Return the bytes of the optimizer's state for each byte of a row."""
    return optimizer_bytes(kind, 1, dim) / table_bytes(1, dim)


def _gb(size: float) -> str:
    """Return a size in gigabytes."""
    return f"{size / 1e9:,.1f}"
