"""Ranks of test_resume.py, started once for as many tests as possible.

    torchrun --nproc-per-node N -m tests.distributed.resume_ranks START OUT DATASET PAIRS SAVED ...

saves small models of every layout, and loads the models that the starts SAVED saved into every layout: all pairs of
layouts if PAIRS is ``all``, otherwise those of HALVES. It does the same with whole jobs: it stops one halfway, and
resumes those that the starts SAVED stopped. The results are written to OUT/<start>.pt; a start is named by its number
of ranks and a letter, such as ``2a``. The start ``2b`` only loads and resumes: no other start reads what it would save.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trainer.rank
from tests.data.code_files import codes_beside
from tests.data.vector_tables import vectors_beside
from tests.distributed.combinations import Combination
from tests.distributed.engine_ranks import everything, losses_of, make_engine
from tests.distributed.small_model import batches_of
from trainer.checkpoint import model_state as trainer_state
from trainer.config.ranker import JobConfig, load_config
from trainer.engine import build_engine
from trainer.engine.hybrid_engine import HybridEngine, StepResult
from trainer.rank import run_job
from trainer.ranking.checkpoints import Checkpoints
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted, Preemption

LAYOUTS = {
    "sgd": ("table_wise", "row_wise", "column_wise"),
    "adagrad": ("table_wise", "row_wise", "column_wise"),
    "rowwise_adagrad": ("table_wise", "row_wise"),
}
STAGES = (0, 1, 2)

JOB = (
    "data.eval_from=2024-03-06",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "model.dropout=0.2",
    "features.history.short.length=5",
    "features.history.live.length=5",
    "train.batch_size=96",
    "train.epochs=2",
    "train.log_every=5",
    "checkpoint.every_steps=4",
    "checkpoint.keep=2",
    "train.device=cpu",
)
ELSEWHERE = ("features.item.sharding=table_wise", "features.user.sharding=row_wise")
HALVES = {("1a", "2a"): 0, ("3a", "2a"): 1, ("2b", "1a"): 0, ("2b", "3a"): 1}
"""Start and earlier start -> the half of the pairs of layouts that :func:`load_all` loads. So each pair is loaded once
by more ranks than saved it, and once by fewer."""
MODEL_BLOCK_BYTES, JOB_BLOCK_BYTES = 256, 4096
"""Sizes of blocks, so small that shards are written in several pieces; a job has larger tables, and saves often."""

STOP_AFTER = 11
"""Step after which SIGTERM comes: between two entries of the metric history, and between two checkpoints."""


def save_all(world: World, out: Path) -> dict[str, Any]:
    """Train models of every layout for a few steps, save them to ``out``, and return their tensors."""
    saved = {}
    trainer_state.BLOCK_BYTES = MODEL_BLOCK_BYTES
    for number, (optimizer, layouts) in enumerate(LAYOUTS.items()):
        for layout in layouts:
            engine = make_engine(Combination(optimizer, layout, STAGES[number]), world)
            losses_of(engine.steps(islice(batches_of(world.rank, world.size), 3)))
            engine.save(out / f"{optimizer}-{layout}")
            saved[f"{optimizer}-{layout}"] = everything(engine, world)
            engine.close()
    trainer_state.BLOCK_BYTES = JOB_BLOCK_BYTES
    return saved


def load_all(world: World, out: Path, saved: dict[str, dict[str, Tensor]], half: int | None) -> list[str]:
    """Load the models of :func:`save_all` into each layout under each ZeRO stage, and return the differences.

    ``half`` 0 takes the pairs of layouts with even numbers, 1 those with odd numbers, and None all of them.
    """
    wrong = []
    for optimizer, layouts in LAYOUTS.items():
        for number, (there, here) in enumerate(product(layouts, layouts)):
            if half not in (None, number % 2):
                continue
            stage = STAGES[number % 3]
            engine = make_engine(Combination(optimizer, here, stage), world)
            engine.load(out / f"{optimizer}-{there}")
            loaded, expected = everything(engine, world), saved[f"{optimizer}-{there}"]
            engine.close()
            if loaded.keys() != expected.keys():
                wrong.append(f"{optimizer} {there} to {here}: {sorted(loaded.keys() ^ expected.keys())}")
            wrong += [
                f"{optimizer} {there} to {here}, ZeRO {stage}: {name}"
                for name in loaded.keys() & expected.keys()
                if not torch.equal(loaded[name], expected[name])
            ]
    return wrong


@contextmanager
def recorded(world: World, stop_after: int | None = None) -> Iterator[dict[str, Any]]:
    """Record training and its checkpoints. After step ``stop_after`` only the last rank gets SIGTERM."""
    found: dict[str, Any] = {"losses": [], "visits": [], "slow": []}
    advance, save, restore = TrainingState.advance, Checkpoints.save, Checkpoints.restore

    def recording_advance(self: TrainingState, result: StepResult) -> None:
        advance(self, result)
        found["losses"].append(float(result.loss))
        found["visits"] += result.batch.visit_id.tolist()
        if result.batch.slow is not None:
            found["slow"] += result.batch.visit_id[result.batch.slow].tolist()
        if self.step == stop_after and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def recording_save(self: Checkpoints, engine: HybridEngine, state: TrainingState, *, wait: bool = False) -> None:
        if wait:
            found["saved"] = everything(engine, world)
            found["trace"] = [
                {key: entry[key] for key in ("step", "loss", "rows", "auc", "gauc")} for entry in state.metric_history
            ]
            found["step"], found["random"] = state.step, torch.get_rng_state()
        save(self, engine, state, wait=wait)

    def recording_restore(self: Checkpoints, engine: HybridEngine, state: TrainingState) -> Any:
        position = restore(self, engine, state)
        found["loaded"] = everything(engine, world)
        return position

    TrainingState.advance, Checkpoints.save, Checkpoints.restore = (  # type: ignore[method-assign]
        recording_advance,
        recording_save,
        recording_restore,
    )
    try:
        yield found
    finally:
        TrainingState.advance, Checkpoints.save, Checkpoints.restore = advance, save, restore  # type: ignore[method-assign]


def run(world: World, config: JobConfig, stop_after: int | None = None, *, later: bool = False) -> dict[str, Any]:
    """Start a job, and return its record with the visits and random states of all ranks.

    With ``later`` it reads losses late and has metrics recorded by a thread, as on a GPU.
    """
    with recorded(world, stop_after) as found:
        build_engine.HybridEngine = partial(HybridEngine, read_later=later)  # type: ignore[assignment, misc]
        try:
            report = run_job(config, world, Preemption())
            found["report"] = report
        except Preempted:
            found["report"] = None
        finally:
            build_engine.HybridEngine = HybridEngine  # type: ignore[misc]
    for key in ("visits", "slow", "random"):
        found[key] = world.agree(world.gather(found[key]))
    return found


def job(dataset: Path, directory: Path, *overrides: str) -> JobConfig:
    settings = [
        *JOB,
        codes_beside(dataset),
        *vectors_beside(dataset),
        f"data.path={dataset}",
        f"run.directory={directory}",
        *overrides,
    ]
    return load_config("configs/simulated.toml", settings)


def without_plots() -> None:
    """Leave out the report of a job in this process: it takes longer than all the rest of a small job."""
    trainer.rank.write_last_report = lambda directory: None


def main(start: str, out: Path, dataset: Path, pairs: str, earlier: list[str]) -> None:
    trainer_state.BLOCK_BYTES = JOB_BLOCK_BYTES
    without_plots()
    with World.join("cpu") as world:
        outcome: dict[str, Any] = {"wrong": {}, "resumed": {}}
        if not earlier:
            outcome["through"] = run(world, job(dataset, out / start / "through"))
        if start != "2b":
            outcome["saved"] = save_all(world, out / start / "models")
            stopped = out / start / "stopped"
            outcome["stopped"] = run(world, job(dataset, stopped), STOP_AFTER)
            if world.rank == 0:
                shutil.copytree(stopped, out / start / "kept")
            world.barrier()
        if not earlier:
            outcome["resumed"][start] = run(world, job(dataset, stopped), later=True)
        for number, name in enumerate(earlier):
            saved = torch.load(out / f"{name}.pt")["saved"]
            half = None if pairs == "all" else HALVES[start, name]
            outcome["wrong"][name] = load_all(world, out / name / "models", saved, half)
            directory = out / start / f"from-{name}"
            if world.rank == 0:
                shutil.copytree(out / name / "kept", directory)
            world.barrier()
            stage = f"train.deepspeed=configs/deepspeed/zero{(0, 2)[number % 2]}.json"
            outcome["resumed"][name] = run(world, job(dataset, directory, *ELSEWHERE, stage))
        if world.rank == 0:
            torch.save(outcome, out / f"{start}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
