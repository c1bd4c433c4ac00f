"""Ranks of test_alignment.py: torchrun --nproc-per-node N -m tests.distributed.alignment_ranks OUT."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.distributed.aligned_model import (
    ALIGNMENT,
    DENSE_RATE,
    LOOKUPS,
    MOST,
    SEED,
    TABLE_RATE,
    WAYS,
    Way,
    batches_of,
    make_ranker,
    tables,
)
from tests.distributed.engine_ranks import parameters
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, NotFiniteLoss, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.runtime.distributed import World


def make_engine(way: Way, world: World, *, read_later: bool = False) -> HybridEngine:
    return HybridEngine(
        tables(way.sharding),
        LOOKUPS,
        make_ranker(),
        table_optimizer=TableOptimizer("sgd", TABLE_RATE),
        dense_optimizer=DenseOptimizer(DENSE_RATE),
        deepspeed={
            "zero_optimization": {"stage": way.stage},
            "gradient_clipping": way.clipping,
            "gradient_accumulation_steps": way.parts,
        },
        loss=BehaviourLoss(torch.ones(2)),
        batch_size=6 * MOST,
        device=world.device,
        seed=SEED,
        alignment=way.alignment,
        read_later=read_later,
    )


def train(way: Way, world: World) -> dict[str, Any]:
    engine = make_engine(way, world)
    results = list(engine.steps(batches_of(world.rank, world.size)))
    found = {
        "losses": [float(result.loss) for result in results],
        "aligned": [float(result.alignment) for result in results],
        "own_rows": [result.batch.rows for result in results],
        "parameters": parameters(engine, world),
    }
    engine.close()
    return found


def not_finite(world: World, *, read_later: bool) -> bool:
    """True if an alignment loss that is not finite stops all ranks before anything is trained."""
    engine = make_engine(Way(alignment=replace(ALIGNMENT, temperature=1e-45)), world, read_later=read_later)
    before = parameters(engine, world)
    try:
        list(engine.steps(batches_of(world.rank, world.size)))
    except NotFiniteLoss:
        after = parameters(engine, world)
        return all(torch.equal(before[name], after[name]) for name in before)
    finally:
        engine.close()
    return False


def main(out: Path) -> None:
    with World.join("cpu") as world:
        outcome = {name: train(way, world) for name, way in WAYS.items()}
        own_rows = world.gather(outcome["row_wise"]["own_rows"])
        stopped = world.gather(all([not_finite(world, read_later=later) for later in (False, True)]))
        if world.rank == 0:
            torch.save(outcome | {"own_rows": own_rows, "stopped": stopped}, out / f"{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
