"""Train a multi-task ranker and evaluate it on later days. One process of it runs on every rank.

limelight train configs/simulated.toml --ranks 2
torchrun --nproc-per-node 2 -m trainer.rank configs/simulated.toml train.epochs=2
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from modules.ranker import RankerKind
from trainer.command import add_train_arguments, rank_parser
from trainer.config import JobConfig, load_config
from trainer.data.dataset import Data
from trainer.data.features import FeatureMap
from trainer.data.loader import Loader
from trainer.distributed import World, run_rank
from trainer.engine import HybridEngine, StepResult
from trainer.errors import UserError
from trainer.evaluate import calibration_curve, evaluate, predict, read_truth
from trainer.job import (
    Split,
    build_engine,
    check_settings,
    fit_once,
    freeze_at_end_of_training,
    held_out_loader,
    rows_per_rank,
    split_in_time,
    training_loader,
)
from trainer.metrics import ProgressiveMetrics, Report
from trainer.progress import Progress
from trainer.report import PHASES, metrics_table, write_report
from trainer.run import choose_directory, create_run, write_json
from trainer.schedule import learning_rate_factor
from trainer.sharding import format_plan

Trace = list[dict[str, Any]]
"""What was seen while training, an entry every ``train.log_every`` steps; see ``trainer.report.write_report``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.rank``."""
    parser = rank_parser("trainer.rank", "Train a ranker; one process per rank.")
    add_train_arguments(parser)
    given = parser.parse_args(arguments)

    def job() -> None:
        config = load_config(given.config, given.overrides)
        with World.join(config.train.device) as world:
            run_job(config, world)

    return run_rank(job)


def run_job(config: JobConfig, world: World) -> dict[str, Report]:
    """Train the model of a job and its baselines, evaluate them, and write the run. Returns metrics by model."""
    directory = Path(world.agree(str(choose_directory(config))))
    data = Data.open(config.data.path, config.data.on_corrupt)
    split = split_in_time(config, data.spec)
    check_settings(config, data.spec, world)
    if world.rank == 0:
        create_run(directory, config, world.size)
    fitted = fit_once(config, data, split, directory / "features", world)
    features = FeatureMap(data.spec, config.features, fitted, config.data.behaviours)
    job = Job(config, data, split, features, world)

    reports: dict[str, Report] = {}
    for kind in dict.fromkeys((config.model.kind, *config.train.baselines)):
        home = directory if kind == config.model.kind else directory / "baselines" / kind
        report = train_and_evaluate(job, kind, home)
        if report is not None:
            reports[kind] = report
    if world.rank == 0:
        if reports:
            print("\n" + metrics_table(reports))
        print(f"\nrun: {directory}", flush=True)
    return reports


@dataclass(frozen=True)
class Job:
    """What every model of a job has in common."""

    config: JobConfig
    data: Data
    split: Split
    features: FeatureMap
    world: World


def train_and_evaluate(job: Job, kind: RankerKind, home: Path) -> Report | None:
    """One model from its first step to its files in ``home``; None without a held-out range."""
    config, data, split, features, world = job.config, job.data, job.split, job.features, job.world
    engine = build_engine(config, features, kind, world)
    if world.rank == 0:
        home.mkdir(parents=True, exist_ok=True)
        print(f"{kind}: tables as TorchRec lays them out\n{format_plan(engine.plan)}", flush=True)
    trace = train(engine, training_loader(config, data, split, features, world), job, home)
    engine.save(home / "model")

    report, curve = None, {}
    if split.eval_from is not None:
        frozen = freeze_at_end_of_training(config, data, split)
        loader = held_out_loader(config, data, split, features, world, frozen)
        held_out = predict(engine, loader, quiet=world.rank > 0)
        report = evaluate(held_out, features.behaviours, read_truth(config.data.path, held_out, features.behaviours))
        curve = calibration_curve(held_out, features.behaviours)
    if world.rank == 0:
        write_json(home / "plan.json", engine.plan)
        write_json(home / "metrics.json", metrics_document(config, kind, report, trace))
        write_report(
            home / "report.html",
            title=f"{config.run.name}: {kind}",
            config=config.model_dump(mode="json"),
            models={} if report is None else {kind: report},
            trace=trace,
            plan=engine.plan,
            calibration=curve,
        )
    engine.close()
    return report


def train(engine: HybridEngine, loader: Loader, job: Job, home: Path) -> Trace:
    """One optimizer step after another until all ranks are out of rows; every batch is predicted before it is learnt.

    Raises:
        UserError: there are no rows in the training range.
    """
    config, world = job.config, job.world
    batches = -(-loader.rows_total // rows_per_rank(config, world))
    rows_total, steps_total = world.sum(loader.rows_total), world.max(batches)
    if not rows_total:
        raise UserError(f"{config.data.path}: no training rows in the range that data.train_from and train_until give")
    progressive = ProgressiveMetrics(job.features.behaviours)
    trace: Trace = []
    scalars = SummaryWriter(str(home / "tensorboard")) if world.rank == 0 else None
    with Progress("train", rows_total, "rows", quiet=world.rank > 0) as progress:
        _set_learning_rate(engine, config, 0, steps_total)
        window = Window()
        for step, result in enumerate(engine.steps(iter(loader)), 1):
            batch = result.batch
            progressive.update(batch.user_id, torch.sigmoid(result.logits), batch.label, batch.mask)
            window.add(result)
            if step % config.train.log_every == 0 or step == steps_total:
                trace.append(window.entry(step, progressive.compute()))
                window = Window()
                if scalars is not None:
                    write_scalars(scalars, trace[-1])
            progress.advance(result.rows_global, f"step {step}/{steps_total}, loss {float(result.loss):.4f}")
            _set_learning_rate(engine, config, step, steps_total)
    if scalars is not None:
        scalars.close()
    return trace


def _set_learning_rate(engine: HybridEngine, config: JobConfig, step: int, steps_total: int) -> None:
    schedule = config.optimizer
    factor = learning_rate_factor(step, steps_total, schedule.warmup, schedule.decay)
    engine.set_learning_rate(config.tables.learning_rate * factor, schedule.learning_rate * factor)


class Window:
    """Means over the steps between two lines of the trace."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._loss, self._rows, self._skipped, self._steps = 0.0, 0, 0, 0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self._steps += 1
        self._loss += float(result.loss) * result.rows_global
        self._rows += result.rows_global
        self._skipped += result.batch.skipped_rows
        for phase in PHASES:
            self._seconds[phase] += result.seconds[phase]

    def entry(self, step: int, metrics: Report) -> dict[str, Any]:
        """A line of the trace."""
        return {
            "step": step,
            "loss": self._loss / max(self._rows, 1),
            "rows": self._rows,
            "skipped_rows": self._skipped,
            "rows_per_second": self._rows / (time.perf_counter() - self._started),
            "auc": {name: values["auc"] for name, values in metrics.items()},
            "gauc": {name: values["gauc"] for name, values in metrics.items()},
            **self._seconds,
        }


def write_scalars(scalars: SummaryWriter, entry: dict[str, Any]) -> None:
    """A line of the trace as TensorBoard scalars."""
    step = entry["step"]
    for name in ("loss", "rows_per_second"):
        scalars.add_scalar(name, entry[name], step)
    for phase in PHASES:
        scalars.add_scalar(f"seconds/{phase}", entry[phase], step)
    for metric in ("auc", "gauc"):
        for behaviour, value in entry[metric].items():
            if value is not None:
                scalars.add_scalar(f"progressive_{metric}/{behaviour}", value, step)


def metrics_document(config: JobConfig, kind: str, report: Report | None, trace: Trace) -> dict[str, Any]:
    """The content of ``metrics.json``; undefined metrics are null."""
    seconds = {phase: sum(entry[phase] for entry in trace) for phase in PHASES}
    total = sum(seconds.values())
    rows = sum(entry["rows"] for entry in trace)
    return {
        "behaviours": report or {},
        "model": kind,
        "held_out": {"from": config.data.eval_from, "until": config.data.eval_until, "frozen": config.data.frozen},
        "training": {
            "rows": rows,
            "skipped_rows": sum(entry["skipped_rows"] for entry in trace),
            "rows_per_second": rows / sum(entry["rows"] / entry["rows_per_second"] for entry in trace),
            "share_of_time": {phase: value / total for phase, value in seconds.items()},
        },
    }


if __name__ == "__main__":
    sys.exit(main())
