"""Ranks of test_pairs.py: torchrun --nproc-per-node N -m tests.distributed.pairs_ranks OUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.engine_ranks import parameters
from tests.distributed.pairs_model import (
    DENSE_RATE,
    LOOKUPS,
    MOST,
    PAIR_WAYS,
    SEED,
    TABLE_RATE,
    TEMPERATURE,
    PairWay,
    batches_of,
    make_towers,
    tables,
)
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.in_batch_softmax import InBatchSoftmax
from trainer.runtime.distributed import World


def train(way: PairWay, world: World) -> dict[str, Any]:
    engine = HybridEngine(
        tables(way.sharding),
        LOOKUPS,
        make_towers(),
        table_optimizer=TableOptimizer("sgd", TABLE_RATE),
        dense_optimizer=DenseOptimizer(DENSE_RATE),
        deepspeed={
            "zero_optimization": {"stage": way.stage},
            "gradient_clipping": way.clipping,
            "gradient_accumulation_steps": way.parts,
        },
        loss=InBatchSoftmax(TEMPERATURE, world.control),
        batch_size=6 * MOST,
        device=world.device,
        seed=SEED,
    )
    results = list(engine.steps(batches_of(world.rank, world.size)))
    found = {
        "losses": [float(result.loss) for result in results],
        "rows": [result.rows_global for result in results],
        "left_out": [result.left_out_global for result in results],
        "parameters": parameters(engine, world),
    }
    engine.close()
    return found


def main(out: Path) -> None:
    with World.join("cpu") as world:
        outcome = {name: train(way, world) for name, way in PAIR_WAYS.items()}
        if world.rank == 0:
            torch.save(outcome, out / f"{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
