"""Trains the small model with the engine in many combinations; run by test_engine.py under torchrun.

    torchrun ... tests/distributed/engine_ranks.py OUT

writes the losses, the parameters and the plan of every combination to OUT/<ranks>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from combinations import COMBINATIONS, Combination
from small_model import LOOKUPS, ROWS, SEED, WEIGHTS, PlainTraining, batches_of, ranker, tables

from trainer import tables as engine_tables
from trainer.distributed import World
from trainer.engine import DenseOptimizer, HybridEngine, TableOptimizer


def make_engine(combination: Combination, world: World) -> HybridEngine:
    plain = PlainTraining
    return HybridEngine(
        tables(combination.sharding),
        LOOKUPS,
        ranker(),
        table_optimizer=TableOptimizer(combination.optimizer, plain.LEARNING_RATE, plain.EPS),
        dense_optimizer=DenseOptimizer(plain.DENSE["lr"], plain.DENSE["weight_decay"], plain.DENSE["betas"]),
        deepspeed={
            "zero_optimization": {"stage": combination.stage},
            "gradient_clipping": combination.clipping,
            "gradient_accumulation_steps": combination.parts,
            "bf16": {"enabled": combination.bf16},
        },
        behaviour_weights=WEIGHTS,
        batch_size=2 * ROWS,
        device=world.device,
        seed=SEED,
        overlap=combination.overlap,
    )


def whole_tables(engine: HybridEngine, world: World) -> dict[str, torch.Tensor]:
    """Tables put together from the shards of all ranks."""
    shards = [(name, row, column, shard.clone()) for name, shard, row, column in engine._tables.shards()]
    sizes = {table["table"]: (table["rows"], table["dim"]) for table in engine.plan}
    whole = {name: torch.full(size, torch.nan) for name, size in sizes.items()}
    for rank in range(world.size):
        for name, row, column, shard in broadcast(shards, rank):
            whole[name][row : row + shard.shape[0], column : column + shard.shape[1]] = shard
    return whole


def broadcast(value: Any, source: int) -> Any:
    box = [value]
    torch.distributed.broadcast_object_list(box, src=source)
    return box[0]


def parameters(engine: HybridEngine, world: World) -> dict[str, torch.Tensor]:
    dense = engine._dense.state()["dense"]
    return whole_tables(engine, world) | {name: saved["parameter"].clone() for name, saved in dense.items()}


def run(combination: Combination, world: World) -> dict[str, Any]:
    serves = engine_tables.flat_exchange_serves
    if combination.torchrec_path:
        engine_tables.flat_exchange_serves = lambda device, shardings: False
    engine = make_engine(combination, world)
    engine_tables.flat_exchange_serves = serves
    results = list(engine.steps(batches_of(world.rank, world.size)))
    outcome = {
        "losses": [float(result.loss) for result in results],
        "rows": [result.rows_global for result in results],
        "parameters": parameters(engine, world),
        "plan": engine.plan,
    }
    engine.close()
    return outcome


def main(out: str) -> None:
    with World.join("cpu") as world:
        outcomes = {str(combination): run(combination, world) for combination in COMBINATIONS}
        if world.rank == 0:
            torch.save(outcomes, Path(out) / f"{world.size}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
