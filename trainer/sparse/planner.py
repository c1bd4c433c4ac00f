"""Sharding plan of the tables: the allowed shardings, TorchRec's planner, and the plan as text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torchrec.optim as torchrec_optimizers
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan, ShardMetadata

from modules.embeddings import Table
from modules.table_set import TableSet
from trainer.console.errors import UserError
from trainer.sparse.dynamic_ids import BUCKET_ROWS, ID_BYTES

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}

_COUNTED_AS = {
    "sgd": torchrec_optimizers.SGD,
    "adagrad": torchrec_optimizers.Adagrad,
    "rowwise_adagrad": torchrec_optimizers.RowWiseAdagrad,
}
"""Classes by which the planner knows the size of an optimizer's state."""

COLUMN_MULTIPLE = 4
"""Widths of tables and of column shards are multiples of this: fbgemm reads rows in vectors of four floats."""

SMALL_TABLE_BYTES = 16 << 20
"""Tables up to this size are not cut by rows on GPUs: each rank would send a few ids to every other rank, and the
planner's estimate of the time does not count messages."""

RESERVED_SHARE = 0.15
"""Share of each rank's memory that the planner leaves free of tables and of what it counts with them."""


@dataclass(frozen=True)
class TableOptimizer:
    """Optimizer that is fused into the tables' backward pass.

    Attributes:
        kind: ``sgd``; ``adagrad``, with one accumulator for each element; or ``rowwise_adagrad``, with one for each
            row, which sums the mean square of the row's gradient.
        learning_rate: learning rate at the start; ``HybridEngine.set_learning_rate`` changes it.
        eps: added to the root of Adagrad's accumulator.
    """

    kind: Literal["sgd", "adagrad", "rowwise_adagrad"]
    learning_rate: float
    eps: float = 1e-8


def sharding_types(table: Table, optimizer: TableOptimizer, world: int, device_type: str = "cpu") -> list[str]:
    """Return the shardings that the planner may choose for a table.

    Returns:
        The sharding that the table's declaration sets. For ``auto`` the shardings that train the table exactly:
        ``table_wise`` on one rank, where cutting gains nothing, and for small tables on GPUs, else ``table_wise`` and
        ``row_wise``. On several machines TorchRec has nothing better: its unpooled collections have no
        ``table_row_wise`` sharding, which would cut a table over the ranks of one machine only.

    Raises:
        UserError: the declaration sets a sharding that cannot train the table, with the reason.
    """
    if table.sharding == "auto":
        small = device_type == "cuda" and 4 * table.rows * table.dim <= SMALL_TABLE_BYTES
        return ["table_wise"] if world == 1 or small else ["table_wise", "row_wise"]
    reason = None
    if table.sharding == "data_parallel":
        reason = (
            "TorchRec has no fused kernel for it (its gradient would bypass the tables' optimizer), and on a CPU "
            "its kernel pools the rows of a sequence"
        )
    elif table.sharding == "column_wise" and optimizer.kind == "rowwise_adagrad":
        reason = (
            "each part of a row would keep an accumulator of its own, so that results and checkpoints would depend "
            "on the number of ranks; use sgd, or another sharding"
        )
    elif table.sharding == "column_wise" and world > 1 and _column_parts(table.dim, world) == 1:
        reason = f"{table.dim} columns cannot be cut into equal parts of a multiple of {COLUMN_MULTIPLE}"
    elif table.sharding == "column_wise" and table.dynamic:
        reason = "the ids of a dynamic table belong to whole rows; use row_wise"
    if reason:
        raise UserError(f"table {table.name!r}: sharding = {table.sharding!r} with {optimizer.kind}: {reason}")
    return [table.sharding]


def make_sharder(optimizer: TableOptimizer, *, index_dedup: bool = False) -> EmbeddingCollectionSharder:
    """Return TorchRec's sharder with the fused optimizer; its own ``index_dedup`` has no CPU kernel."""
    fused = {"optimizer": OPTIMIZERS[optimizer.kind], "learning_rate": optimizer.learning_rate, "eps": optimizer.eps}
    return EmbeddingCollectionSharder(fused_params=fused, use_index_dedup=index_dedup)


def describe_topology(
    world: int, local_size: int, device_type: str, *, host_bytes: int, device_bytes: int | None = None
) -> Topology:
    """Return the machines as TorchRec's planner sees them.

    The bandwidths are the planner's own, on every machine: so the plan depends on the memory alone, and a cluster that
    is only described gets the plan that the job makes there.

    Args:
        world: number of ranks.
        local_size: number of ranks on one machine.
        device_type: ``cpu`` or ``cuda``.
        host_bytes: memory of a machine, shared by its ranks.
        device_bytes: memory of a GPU; None on a CPU.
    """
    return Topology(
        world_size=world,
        local_world_size=local_size,
        compute_device=device_type,
        ddr_cap=host_bytes // local_size,
        hbm_cap=device_bytes,
    )


def plan_tables(
    tables: TableSet,
    sharder: EmbeddingCollectionSharder,
    optimizer: TableOptimizer,
    topology: Topology,
    *,
    batch_size: int,
) -> ShardingPlan:
    """Return TorchRec's plan for the tables on described machines; needs no process group and no GPU.

    Args:
        tables: tables on the meta device.
        sharder: sharder of :func:`make_sharder`.
        optimizer: optimizer of the tables.
        topology: machines of :func:`describe_topology`.
        batch_size: rows of one rank in a step.

    Raises:
        UserError: a sharding or a width is refused, or the tables do not fit into memory.
    """
    world, device_type = topology.world_size, topology.compute_device
    for table in tables.tables:
        if table.dim % COLUMN_MULTIPLE:
            raise UserError(f"table {table.name!r}: dim = {table.dim} is not a multiple of {COLUMN_MULTIPLE}")
    lookups = [lookup for _, members in tables.groups for lookup in members]
    # Rows that get another id are written past a cache, and the exchange of their collection has one kernel.
    uncached = {table.dim for table in tables.tables if table.dynamic}
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=sharding_types(table, optimizer, world, device_type),
            # In the order of the table's features. Without it, the planner counts one id for all lookups of a table.
            pooling_factors=[float(lookup.most_ids) for lookup in lookups if lookup.table == table.name],
            # On a GPU the planner may keep a table that is too large for it in host memory, behind a cache.
            compute_kernels=["fused"]
            if device_type == "cpu" or table.dim in uncached
            else ["fused", "fused_uvm", "fused_uvm_caching"],
            min_partition=table.dim // _column_parts(table.dim, world),
        )
        for table in tables.tables
    }
    reserved = RESERVED_SHARE
    if device_type == "cuda":
        # The planner does not know the columns of dynamic ids; rows that do not fit on one rank are cut evenly.
        columns = ID_BYTES * sum(table.rows for table in tables.tables if table.dynamic)
        reserved = min(1.0, reserved + columns / world / topology.devices[0].storage.hbm)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=reserved),
    )
    try:
        with _optimizer_counts(tables, optimizer):
            plan: ShardingPlan = planner.plan(tables, [sharder])
    except PlannerError as error:
        size = sum(table.rows * table.dim for table in tables.tables) * 4 / 1e9
        raise UserError(f"no sharding of {size:,.1f} GB of tables on {world} ranks: {_first_line(error)}") from None
    dynamic = {table.name for table in tables.tables if table.dynamic}
    for parameters in plan.plan.values():
        for name, parameter in parameters.items():
            if name in dynamic and parameter.sharding_type == "row_wise":
                _cut_between_buckets(parameter.sharding_spec.shards)
            if not parameter.compute_kernel.startswith("fused"):
                raise RuntimeError(f"table {name!r} got kernel {parameter.compute_kernel!r}: it would never be trained")
    return plan


def make_plan(
    tables: TableSet,
    sharder: EmbeddingCollectionSharder,
    optimizer: TableOptimizer,
    *,
    device: torch.device,
    local_size: int,
    batch_size: int,
    control: dist.ProcessGroup,
) -> ShardingPlan:
    """Return TorchRec's plan for the tables, the same on every rank. Collective.

    Args:
        tables: tables on the meta device.
        sharder: sharder of :func:`make_sharder`.
        optimizer: optimizer of the tables.
        device: device of this rank.
        local_size: number of ranks on one machine.
        batch_size: rows of one rank in a step.
        control: a gloo group of all ranks.

    Raises:
        UserError: a sharding or a width is refused, or the tables do not fit into memory.
    """
    # The plan, or the error that explains why there is none.
    answer: list[Any] = [None]
    if dist.get_rank(control) == 0:
        topology = describe_topology(
            dist.get_world_size(control),
            local_size,
            device.type,
            host_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            device_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        )
        try:
            answer[0] = plan_tables(tables, sharder, optimizer, topology, batch_size=batch_size)
        except UserError as error:
            answer[0] = error
    # Only the first rank plans: TorchRec's collective planner would leave the other ranks waiting if it failed there.
    dist.broadcast_object_list(answer, src=0, group=control)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


@contextmanager
def _optimizer_counts(tables: TableSet, optimizer: TableOptimizer) -> Iterator[None]:
    """Let the planner count the state of the fused optimizer, which it looks for at the parameters.

    The mark is removed at the end, since the sharder would take it for another optimizer than its fused one.
    """
    parameters: list[Any] = list(tables.parameters())
    for parameter in parameters:
        parameter._optimizer_classes = [_COUNTED_AS[optimizer.kind]]
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter._optimizer_classes


def _cut_between_buckets(shards: Sequence[ShardMetadata]) -> None:
    """Move the shard bounds of a row-wise sharded dynamic table to the starts of its buckets."""
    rows, first = sum(shard.shard_sizes[0] for shard in shards), 0
    buckets = -(-rows // BUCKET_ROWS)
    block = -(-buckets // len(shards)) * BUCKET_ROWS
    for shard in shards:
        shard.shard_offsets[0], shard.shard_sizes[0] = first, min(block, rows - first)
        first += shard.shard_sizes[0]


def describe_plan(plan: ShardingPlan, tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Return the plan as JSON: for each table its size, module, sharding, kernel, and the shard of each rank."""
    chosen = {name: (path, p) for path, parameters in plan.plan.items() for name, p in parameters.items()}
    described = []
    for table in tables:
        path, parameter = chosen[table.name]
        described.append(
            {
                "table": table.name,
                "rows": table.rows,
                "dim": table.dim,
                "module": path,
                "sharding": parameter.sharding_type,
                "kernel": parameter.compute_kernel,
                "ranks": list(parameter.ranks),
                "shards": [list(shard.shard_sizes) for shard in parameter.sharding_spec.shards],
            }
        )
    return described


def format_plan(described: Sequence[dict[str, Any]]) -> str:
    """Return the plan of :func:`describe_plan` as text, with one line for each table."""
    lines = []
    for table in described:
        shards = ", ".join(
            f"rank {rank}: {rows:,} x {columns}"
            for rank, (rows, columns) in zip(table["ranks"], table["shards"], strict=True)
        )
        lines.append(
            f"{table['table']:12} {table['rows']:>12,} x {table['dim']:<4} {table['sharding']:12} "
            f"{table['kernel']:8} {shards}"
        )
    return "\n".join(lines)


def _column_parts(dim: int, world: int) -> int:
    """Return the largest number of equal parts, at most one for each rank, that the columns can be cut into."""
    return max(n for n in range(1, world + 1) if n == 1 or (dim % n == 0 and dim // n % COLUMN_MULTIPLE == 0))


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty, or else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
