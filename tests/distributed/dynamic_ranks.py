"""Ranks of test_dynamic.py, started once for all its tests.

    torchrun --nproc-per-node N -m tests.distributed.dynamic_ranks OUT

trains the small model with dynamic tables and writes the results to OUT/<ranks>.pt and checkpoints to OUT. Another
number of ranks that starts later resumes from these checkpoints. If OUT/<ranks>.pt exists, ranks only resume.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.dynamic_model import (
    ALL_CASES,
    CHECKPOINTED,
    STEPS,
    Case,
    dynamic_batches,
    dynamic_tables,
    resharded,
)
from tests.distributed.engine_ranks import everything, losses_of, parameters
from tests.distributed.small_model import LOOKUPS, ROWS, SEED, WEIGHTS, PlainTraining, ranker
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.runtime.distributed import World

HALF = STEPS // 2


def make_engine(case: Case, world: World) -> HybridEngine:
    plain = PlainTraining
    return HybridEngine(
        dynamic_tables(case),
        LOOKUPS,
        ranker(),
        table_optimizer=TableOptimizer(case.optimizer, plain.LEARNING_RATE, plain.EPS),
        dense_optimizer=DenseOptimizer(plain.DENSE_RATE, plain.WEIGHT_DECAY, plain.BETAS),
        deepspeed={"gradient_clipping": case.clipping, "gradient_accumulation_steps": case.parts},
        loss=BehaviourLoss(WEIGHTS),
        batch_size=2 * ROWS,
        device=world.device,
        seed=SEED,
        overlap=case.overlap,
        device_form=case.device,
    )


def columns(engine: HybridEngine, world: World) -> dict[str, Tensor]:
    """Return whole columns of the id maps by ``TABLE/COLUMN``; every row comes from exactly one rank."""
    own_shards = [
        (f"{name}/{column}", len(tensor), offset[0], shard.clone())
        for name, state in engine._state()["dynamic"].items()
        for column, tensor in state.items()
        if isinstance(tensor, DTensor)
        for shard, offset in zip(tensor.to_local().local_shards(), tensor.to_local().local_offsets(), strict=True)
    ]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, own_shards)
    assembled: dict[str, Tensor] = {}
    held: dict[str, int] = {}
    for key, rows, first, shard in (part for parts in found for part in parts):
        into = assembled.setdefault(key, torch.zeros(rows, dtype=shard.dtype))
        into[first : first + len(shard)] = shard
        held[key] = held.get(key, 0) + len(shard)
    assert all(held[key] == len(column) for key, column in assembled.items())
    return assembled


def counts(engine: HybridEngine) -> dict[str, dict[str, int]]:
    return {name: asdict(each) for name, each in engine.id_counts().items()}


def snapshot(engine: HybridEngine, world: World) -> dict[str, Any]:
    """Return the whole state of a model as whole tensors."""
    return {"tensors": everything(engine, world) | columns(engine, world), "counts": counts(engine)}


def train(case: Case, world: World) -> dict[str, Any]:
    engine = make_engine(case, world)
    losses = losses_of(engine.steps(dynamic_batches(world.rank, world.size)))
    outcome = {
        "losses": losses,
        "parameters": parameters(engine, world),
        "plan": engine.plan,
        **snapshot(engine, world),
    }
    logits = [predicted for _, predicted in engine.predict(dynamic_batches(world.rank, world.size))]
    outcome["logits"] = world.gather(logits)
    outcome["after_prediction"] = snapshot(engine, world)
    engine.close()
    return outcome


def save_halfway(case: Case, world: World, path: Path) -> dict[str, Any]:
    """Return the final states of an uninterrupted run and of one that a new engine resumed halfway."""
    batches = [*dynamic_batches(world.rank, world.size)]
    engine = make_engine(case, world)
    # The next batch is on its way already when the first half ends.
    stopped = losses_of(islice(engine.steps(iter(batches)), HALF))
    engine.save(path)
    saved = snapshot(engine, world)
    engine.close()

    engine = make_engine(case, world)
    engine.load(path)
    loaded = snapshot(engine, world)
    losses = stopped + losses_of(engine.steps(iter(batches[HALF:])))
    outcome = {"saved": saved, "loaded": loaded, "losses": losses, **snapshot(engine, world)}
    engine.close()
    return outcome


def load_elsewhere(case: Case, world: World, path: Path) -> dict[str, Any]:
    """Load a checkpoint of another number of ranks and another layout, and train on."""
    engine = make_engine(resharded(case), world)
    engine.load(path)
    loaded = snapshot(engine, world)
    losses = losses_of(engine.steps(islice(dynamic_batches(world.rank, world.size), HALF, None)))
    outcome = {"loaded": loaded, "losses": losses, **snapshot(engine, world)}
    engine.close()
    return outcome


def main(out: Path) -> None:
    with World.join("cpu") as world:
        outcome: dict[str, Any] = {}
        again = (out / f"{world.size}.pt").exists()
        world.barrier()
        for case in () if again else ALL_CASES:
            outcome[str(case)] = train(case, world)
        for number, case in enumerate(CHECKPOINTED):
            if not again:
                outcome[f"resumed {case}"] = save_halfway(case, world, out / f"{world.size}-{number}")
            other = out / f"{3 - world.size}-{number}"
            if other.exists():
                outcome[f"elsewhere {case}"] = load_elsewhere(case, world, other)
        if world.rank == 0:
            torch.save(outcome, out / f"{world.size}{'-again' if again else ''}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
