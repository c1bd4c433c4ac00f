"""Train a multi-task ranker and evaluate it on later days. One process of it runs on every rank.

limelight train configs/simulated.toml --ranks 2
torchrun --nproc-per-node 2 -m trainer.rank configs/simulated.toml train.epochs=2

The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.ranker import RankerKind
from trainer.checkpoint.manifest import DatasetEntry, list_checkpoints
from trainer.checkpoint.run_directory import begin_run, choose_directory, homes, make_directory
from trainer.config.ranker import JobConfig, load_config
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.run_log import open_log, set_step
from trainer.data.features.feature_map import FeatureMap
from trainer.data.format.dataset import Dataset, fingerprint
from trainer.metrics.behaviour_metrics import Report
from trainer.ranking.checkpoints import Checkpoints, Identity
from trainer.ranking.evaluation import calibration_curve, evaluate, metrics_document, predict, read_truth
from trainer.ranking.report import metrics_table, write_report
from trainer.ranking.search_refresh import SearchSpaceRefresher, make_space
from trainer.ranking.setup import (
    Split,
    build_engine,
    check_settings,
    fit_once,
    freeze_at_end_of_training,
    held_out_loader,
    split_in_time,
    training_loader,
)
from trainer.ranking.stream_train_loop import train_stream
from trainer.ranking.train_loop import train
from trainer.ranking.training_state import TrainingState
from trainer.ranking.training_stream import open_stream
from trainer.ranking.warm_start import check_source, format_taken, warm_start
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.files import write_json
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.runtime.run_lock import locked
from trainer.serving.publish import publisher
from trainer.sparse.planner import format_plan

logger = logging.getLogger("trainer.rank")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.rank``."""
    given = parse_rank_arguments("trainer.rank", "Train a ranker; one process per rank.", TRAIN_ARGUMENTS, arguments)

    def job() -> None:
        config = load_config(given.config, given.overrides)
        with World.join(config.train.device) as world:
            # From here on: a rank that still looks for the others does not hear what Python has handlers for.
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: JobConfig, world: World, preemption: Preemption) -> dict[str, Report]:
    """Train the model of a job and its baselines, evaluate them, and write the run. Returns metrics by model."""
    directory = Path(world.agree(str(choose_directory(config))))
    data = Dataset.open(config.data.path, config.data.on_corrupt)
    split = split_in_time(config, data.spec)
    check_settings(config, data.spec, world.size)
    begun = any(list_checkpoints(home / "checkpoints") for home in homes(directory, config).values())
    if config.init_from.run and not begun:
        check_source(config)
    if world.rank == 0:
        make_directory(directory)
    world.barrier()
    with locked(directory) if world.rank == 0 else nullcontext():
        dataset = DatasetEntry(path=config.data.path, fingerprint=fingerprint(config.data.path, data.spec))
        if world.rank == 0:
            begin_run(directory, config, world.size, dataset)
        world.barrier()
        open_log(directory / "logs", world.rank)
        if world.rank == 0 and not config.run.directory and (directory / "features").exists():
            logger.info(f"going on with the unfinished run {directory}; resume.enabled=false starts a new one")
        fitted = fit_once(config, data, split, directory / "features", world)
        features = FeatureMap(data.spec, config.features, fitted, config.data.behaviours)
        job = Job(config, data, split, features, dataset, world, preemption)

        reports: dict[str, Report] = {}
        for kind, home in homes(directory, config).items():
            report = finished_report(home, world) or train_and_evaluate(job, kind, home)
            if report["behaviours"]:
                reports[kind] = report["behaviours"]
    if reports:
        logger.info("\n" + metrics_table(reports))
    logger.info(f"\nrun: {directory}")
    return reports


@dataclass(frozen=True)
class Job:
    """What every model of a job has in common."""

    config: JobConfig
    data: Dataset
    split: Split
    features: FeatureMap
    dataset: DatasetEntry
    world: World
    preemption: Preemption


def finished_report(home: Path, world: World) -> dict[str, Any] | None:
    """The metrics document of a model that an earlier start of the job has finished; None if it has not."""
    document = None
    if world.rank == 0 and (home / "metrics.json").exists():
        document = json.loads((home / "metrics.json").read_text())
        logger.info(f"{document['model']}: finished already, in {home}")
    return world.agree(document)


def train_and_evaluate(job: Job, kind: RankerKind, home: Path) -> dict[str, Any]:
    """One model, from its last checkpoint or its first step to its files in ``home``. Returns ``metrics.json``."""
    config, data, split, features, world = job.config, job.data, job.split, job.features, job.world
    stream = None if config.stream is None else open_stream(config, data, split, features, world, home)
    engine = build_engine(config, features, kind, world)
    logger.info(f"{kind}: tables as TorchRec lays them out\n{format_plan(engine.plan)}")
    checkpoints = Checkpoints(
        home / "checkpoints",
        Identity(config, kind, features.behaviours, job.dataset),
        world,
        publisher(config, home),
    )
    space = make_space(config, features)
    state = TrainingState.at_start(features.behaviours, stream, space)
    position = checkpoints.restore(engine, state)
    if position is None and config.init_from.run:
        logger.info(format_taken(warm_start(engine, config, kind, features, world)))
    searching = None if space is None else SearchSpaceRefresher(space, config, features, engine, world)
    if searching is not None:
        searching.begin()
    set_step(state.step)
    common: dict[str, Any] = {
        "config": config,
        "world": world,
        "preemption": job.preemption,
        "home": home,
        "searching": searching,
    }
    if stream is not None and not state.finished:
        with stream.open(position) as reader:
            train_stream(engine, stream, reader, state, checkpoints, **common)
    elif not state.finished:
        loader = training_loader(config, data, split, features, world, position, space=space, first_step=state.step)
        train(engine, loader, state, checkpoints, **common)

    report, curve = None, {}
    if split.eval_from is not None:
        frozen = freeze_at_end_of_training(config, data, split)
        loader = held_out_loader(config, data, split, features, world, frozen, space)
        held_out = predict(engine, loader, quiet=world.rank > 0)
        report = evaluate(held_out, features.behaviours, read_truth(config.data.path, held_out, features.behaviours))
        curve = calibration_curve(held_out, features.behaviours)
    document = metrics_document(config, kind, report, state.trace, checkpoints.stalls)
    if stream is not None:
        document["stream"] = stream.summary(world, state.progressive)
        logger.info(f"predicted as requests came:\n{metrics_table({kind: document['stream']['progressive']})}")
    if world.rank == 0:
        write_json(home / "plan.json", engine.plan)
        write_report(
            home / "report.html",
            title=f"{config.run.name}: {kind}",
            config=config.model_dump(mode="json"),
            models={} if report is None else {kind: report},
            trace=state.trace,
            plan=engine.plan,
            calibration=curve,
        )
        # Last: what has a metrics.json is not done again.
        write_json(home / "metrics.json", document)
    checkpoints.close()
    engine.close()
    return document


if __name__ == "__main__":
    sys.exit(main())
