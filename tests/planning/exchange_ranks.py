"""Real tables on one or two ranks: prints the measured and the planned bytes of each rank as JSON.

torchrun --nproc-per-node 2 -m tests.planning.exchange_ranks row_wise rowwise_adagrad deduplicate
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table
from modules.table_set import TableSet
from tests.planning.measured_peak import measured_peak
from trainer.planning.exchange_traffic import TableIds, exchange_bytes, expected_distinct, rank_traffic
from trainer.planning.table_memory import rank_tables
from trainer.runtime.distributed import World
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse import flat_exchange
from trainer.sparse.planner import (
    TableOptimizer,
    describe_plan,
    describe_topology,
    make_sharder,
    plan_tables,
)
from trainer.sparse.sharded_tables import ShardedTables

ROWS = 400
"""Rows of a rank's batch."""

DIM, LENGTH = 16, 10
LOOKUPS = (
    Lookup("user", "user", 1),
    Lookup("item", "item", 1),
    Lookup("side", "side", 3),
    Lookup("seen_item", "item", None, max_length=LENGTH),
    Lookup("seen_side", "side", None, max_length=LENGTH),
)
SIZES = {"user": 5000, "item": 2001, "side": 301}


def tables(sharding: str) -> list[Table]:
    """Return the declared tables."""
    return [Table(name, rows, DIM, sharding=sharding) for name, rows in SIZES.items()]  # type: ignore[arg-type]


def draw_ids(rank: int) -> dict[str, torch.Tensor]:
    """Return lookup -> ids of a rank, drawn evenly."""
    random = torch.Generator().manual_seed(rank)
    return {
        lookup.name: torch.randint(0, SIZES[lookup.table], (ROWS * lookup.most_ids,), generator=random)
        for lookup in LOOKUPS
    }


def keyed(ids: dict[str, torch.Tensor]) -> KeyedJaggedTensor:
    """Return the ids as TorchRec takes them."""
    lengths = torch.cat([torch.full((ROWS,), lookup.most_ids) for lookup in LOOKUPS])
    return KeyedJaggedTensor(
        keys=list(ids),
        values=torch.cat(list(ids.values())),
        lengths=lengths,
        stride=ROWS,
        length_per_key=[len(of_key) for of_key in ids.values()],
    )


def planned_ids(deduplicate: bool) -> dict[str, TableIds]:
    """Return table -> ids that the formulas expect."""
    found = {}
    for name, rows in SIZES.items():
        count = ROWS * sum(lookup.most_ids for lookup in LOOKUPS if lookup.table == name)
        found[name] = TableIds(count, expected_distinct(count, rows) if deduplicate else count)
    return found


def measure(sharding: str, kind: Any, deduplicate: bool, world: World) -> dict[str, Any]:
    """Return measured and planned bytes of this rank."""
    held = ShardedTables(
        tables(sharding),
        LOOKUPS,
        TableOptimizer(kind, 0.1),
        device=world.device,
        local_size=world.size,
        batch_size=ROWS,
        seed=1,
        clock=PhaseClock(world.device),
        control=world.control,
        deduplicate=deduplicate,
    )
    sent: list[int] = []
    real = flat_exchange.dist.all_to_all_single

    def counted(incoming: Any, outgoing: Any, *sizes: Any, **options: Any) -> Any:
        own = outgoing.split(sizes[1])[world.rank]
        sent.append(outgoing.nbytes - own.nbytes)
        return real(incoming, outgoing, *sizes, **options)

    ids = keyed(draw_ids(world.rank))
    gradients = {lookup.name: [torch.ones(ROWS * lookup.most_ids, DIM)] for lookup in LOOKUPS}

    def step() -> None:
        exchanges = held.exchanges([ids])
        for exchange in exchanges:
            exchange.start()
        for exchange in exchanges:
            exchange.send()
        rows = [exchange.rows(1) for exchange in exchanges]
        for exchange in exchanges:
            exchange.update(gradients, 1.0)
        del rows

    step()
    dist.all_to_all_single = counted
    try:
        peak = measured_peak(step)
    finally:
        dist.all_to_all_single = real
    described = plan_tables(
        TableSet(tables(sharding), LOOKUPS),
        make_sharder(TableOptimizer(kind, 0.1)),
        TableOptimizer(kind, 0.1),
        describe_topology(world.size, world.size, "cpu", host_bytes=world.size << 33),
        batch_size=ROWS,
    )
    memory = rank_tables(held.plan, kind, world.size)[world.rank]
    traffic = rank_traffic(held.plan, planned_ids(deduplicate), world.size)[world.rank]
    return {
        "plan": [held.plan, describe_plan(described, tables(sharding))],
        "tables": [sum(shard.values.nbytes for shard in held.shards()), memory.tables],
        "optimizer": [sum(shard.values.nbytes for _, shard in held.optimizer_shards()), memory.optimizer],
        # The batch's own ids were made before the step, and the places of ids are memory of NumPy.
        "exchange": [
            peak + ids.values().nbytes,
            exchange_bytes(traffic, world.size, overlap=False, deduplicate=deduplicate),
        ],
        "sent": sent,
        "ids_out": [sum(sent[1::4]), traffic.ids_out],
        "rows_out": [sum(sent[2::4]), traffic.rows_out],
        "gradients_out": [sum(sent[3::4]), traffic.rows_in],
        "collectives": [len(sent), 4 * (world.size > 1)],
    }


def main() -> None:
    """Measure and print the figures of all ranks."""
    sharding, kind, way = sys.argv[1:]
    with World.join("cpu") as world:
        found = world.gather(measure(sharding, kind, way == "deduplicate", world))
        if found is not None:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
