"""Ranks of test_engine.py, started once for all its tests.

    torchrun --nproc-per-node N -m tests.distributed.engine_ranks OUT fast|slow

trains the small model in every combination of the fast tests, or of all tests, and writes the results to
OUT/<ranks>.pt. Two ranks also write checkpoints, which a single rank reads later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.combinations import (
    BFLOAT16,
    CHECKPOINTED,
    DCN,
    FLOAT32,
    NO_OVERLAP,
    REST,
    SHARDED,
    Combination,
    resharded,
)
from tests.distributed.small_model import LOOKUPS, ROWS, SEED, STEPS, WEIGHTS, PlainTraining, batches_of, ranker, tables
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, StepResult, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.runtime.distributed import World


def make_engine(combination: Combination, world: World) -> HybridEngine:
    plain = PlainTraining
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": combination.stage},
        "gradient_clipping": combination.clipping,
        "gradient_accumulation_steps": combination.parts,
        "bf16": {"enabled": combination.bf16},
    }
    if combination.accumulate_in:
        settings["data_types"] = {"grad_accum_dtype": combination.accumulate_in}
    return HybridEngine(
        tables(combination.sharding),
        LOOKUPS,
        ranker(combination.network),
        table_optimizer=TableOptimizer(combination.optimizer, plain.LEARNING_RATE, plain.EPS),
        dense_optimizer=DenseOptimizer(plain.DENSE_RATE, plain.WEIGHT_DECAY, plain.BETAS),
        deepspeed=settings,
        loss=BehaviourLoss(WEIGHTS),
        batch_size=2 * ROWS,
        device=world.device,
        seed=SEED,
        overlap=combination.overlap,
        deduplicate=combination.deduplicate,
        # Without dynamic tables, a GPU uses TorchRec's exchange.
        device_form=combination.torchrec_path,
    )


def whole(sharded: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Join the shards of all ranks to whole tensors; an element that no rank has is NaN."""
    own_shards = [
        (name, tuple(tensor.shape), offset, shard.clone())
        for name, tensor in sharded.items()
        if isinstance(tensor, DTensor)
        for shard, offset in zip(tensor.to_local().local_shards(), tensor.to_local().local_offsets(), strict=False)
    ]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, own_shards)
    tensors: dict[str, Tensor] = {}
    for name, shape, offset, shard in (part for parts in found for part in parts):
        into = tensors.setdefault(name.split(".")[-2], torch.full(shape, torch.nan))
        into[tuple(slice(at, at + size) for at, size in zip(offset, shard.shape, strict=True))] = shard
    return tensors


def parameters(engine: HybridEngine, world: World) -> dict[str, Tensor]:
    """Return whole tables by name, and dense parameters."""
    dense = engine._dense.state()["dense"]
    tables = whole(engine._tables.state()["tables"], world)
    return tables | {name: saved["parameter"].clone() for name, saved in dense.items()}


def everything(engine: HybridEngine, world: World) -> dict[str, Tensor]:
    """Return the parameters and the states of both optimizers."""
    state = engine._state()
    accumulators = {key: moment for of_table in state["table_optimizer"].values() for key, moment in of_table.items()}
    moments = {
        f"{name}/{key}": tensor.clone() for name, saved in state["dense"].items() for key, tensor in saved.items()
    }
    # "item.momentum1" -> "item": distinct from the table itself.
    accumulated = {f"{name}/accumulated": tensor for name, tensor in whole(accumulators, world).items()}
    return parameters(engine, world) | moments | accumulated | {"dense_step": state["dense_step"]}


def losses_of(results: Iterator[StepResult]) -> list[float]:
    return [float(result.loss) for result in results]


def train(combination: Combination, world: World) -> dict[str, Any]:
    engine = make_engine(combination, world)
    results = list(engine.steps(batches_of(world.rank, world.size)))
    outcome = {
        "losses": losses_of(iter(results)),
        "rows": [result.rows_global for result in results],
        "own_rows": [result.batch.rows for result in results],
        "parameters": parameters(engine, world),
        "plan": engine.plan,
        "seconds": [result.seconds for result in results],
    }
    engine.close()
    return outcome


def save_halfway(combination: Combination, world: World, path: Path) -> dict[str, Any]:
    """Return the losses of an uninterrupted run and of one that a new engine resumed halfway."""
    half = STEPS // 2
    engine = make_engine(combination, world)
    through = losses_of(engine.steps(batches_of(world.rank, world.size)))
    end = everything(engine, world)
    engine.close()

    engine = make_engine(combination, world)
    resumed = losses_of(engine.steps(islice(batches_of(world.rank, world.size), half)))
    engine.save(path)
    saved = everything(engine, world)
    engine.close()

    engine = make_engine(combination, world)
    engine.load(path)
    loaded, steps_done = everything(engine, world), engine.steps_done
    resumed += losses_of(engine.steps(islice(batches_of(world.rank, world.size), half, None)))
    outcome = {
        "through": through,
        "resumed": resumed,
        "end": end,
        "end_resumed": everything(engine, world),
        "saved": saved,
        "loaded": loaded,
        "steps_done": steps_done,
    }
    engine.close()
    return outcome


def load_elsewhere(combination: Combination, world: World, path: Path) -> dict[str, Any]:
    """Load a checkpoint of other ranks, another layout and ZeRO stage, and return the losses that follow."""
    engine = make_engine(resharded(combination), world)
    engine.load(path)
    outcome: dict[str, Any] = {"loaded": everything(engine, world)}
    outcome["losses"] = losses_of(engine.steps(islice(batches_of(world.rank, world.size), STEPS // 2, None)))
    engine.close()
    return outcome


def predict(world: World) -> dict[str, Any]:
    """Return predictions of trained engines, also after a training that was stopped early."""
    engine = make_engine(SHARDED[-1], world)
    stopped = losses_of(islice(engine.steps(batches_of(world.rank, world.size)), STEPS // 2))
    before = everything(engine, world)
    logits = [predicted for _, predicted in engine.predict(batches_of(world.rank, world.size))]
    after = everything(engine, world)
    went_on = losses_of(engine.steps(islice(batches_of(world.rank, world.size), STEPS // 2, None)))
    engine.close()
    return {
        "losses": stopped + went_on,
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
        "steps": len(logits),
        "logits": world.gather(logits),
    }


def learning_rates(world: World) -> dict[str, Any]:
    """Return the parameters after steps with learning rates of zero, and the initial ones."""
    engine = make_engine(SHARDED[-1], world)
    initial = parameters(engine, world)
    engine.set_learning_rate(tables=0.0, dense=0.0)
    frozen_losses = losses_of(engine.steps(islice(batches_of(world.rank, world.size), 3)))
    outcome = {"initial": initial, "frozen": parameters(engine, world), "losses": frozen_losses}
    engine.close()
    return outcome


def main(out: Path, *, slow: bool) -> None:
    combinations = (*FLOAT32, *NO_OVERLAP, *DCN, *BFLOAT16, *(REST if slow else ()))
    with World.join("cpu") as world:
        outcome: dict[str, Any] = {
            "trained": {str(combination): train(combination, world) for combination in combinations},
            "predicted": predict(world),
            "learning_rates": learning_rates(world),
        }
        for number, combination in enumerate(CHECKPOINTED):
            checkpoint = out / f"checkpoint-{number}"
            if world.size == 2:
                outcome.setdefault("saved", {})[str(combination)] = save_halfway(combination, world, checkpoint)
            else:
                outcome.setdefault("loaded", {})[str(combination)] = load_elsewhere(combination, world, checkpoint)
        own_rows = world.gather([result["own_rows"] for result in outcome["trained"].values()])
        if world.rank == 0:
            torch.save(outcome | {"own_rows": own_rows}, out / f"{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), slow=sys.argv[2] == "slow")
