"""Train a multi-task ranker and evaluate it on later days. One process of this module runs per rank.

    limelight train configs/simulated.toml --ranks 2
    torchrun --nproc-per-node 2 -m trainer.rank configs/simulated.toml train.epochs=2

The same command with the same overrides resumes an unfinished run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules.ranker import RankerKind
from trainer.checkpoint.manifest import DatasetEntry, list_checkpoints
from trainer.checkpoint.run_directory import begin_run, choose_directory, model_dirs, run_directory, settled
from trainer.checkpoint.tracked_metrics import mlflow_target, tracked_baseline
from trainer.config.precision import describe_precision
from trainer.config.ranker import JobConfig, load_config
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.run_log import open_log
from trainer.data.format.dataset import Dataset, fingerprint
from trainer.metrics.behaviour_metrics import Report
from trainer.ranking.job_features import open_features
from trainer.ranking.metrics_table import metrics_table
from trainer.ranking.model_training import (
    RankerJob,
    evaluate_model,
    finished_report,
    prepare_model,
    train_model,
    write_results,
)
from trainer.ranking.setup import check_machines, check_settings, split_in_time
from trainer.ranking.warm_start import check_source
from trainer.report.run_report import write_last_report
from trainer.runtime.determinism import use_deterministic_kernels
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.semantic_ids.store_address import open_existing_store
from trainer.serving.publish import make_publisher

logger = logging.getLogger("trainer.rank")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.rank``."""
    options = parse_rank_arguments("trainer.rank", "Train a ranker; one process per rank.", TRAIN_ARGUMENTS, arguments)

    def job() -> None:
        config = load_config(options.config, options.overrides)
        if config.train.deterministic:
            use_deterministic_kernels()
        with World.join(config.train.device, bind_cores=config.train.bind_cores) as world:
            # Handlers are installed after the join: while a rank waits in it, Python runs no signal handlers.
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: JobConfig, world: World, preemption: Preemption) -> dict[str, Report]:
    """Train the model of a job and its baselines, evaluate them, and write the run.

    Returns:
        Kind of model -> its metrics on the held-out range.
    """
    directory = Path(world.agree(str(choose_directory(config))))
    config = settled(config, directory, world)
    data = Dataset.open(config.data.path, config.data.on_corrupt)
    split = split_in_time(config, data.spec)
    check_settings(config, data.spec, world.size, open_existing_store)
    check_machines(config, world)
    begun = any(list_checkpoints(model / "checkpoints") for model in model_dirs(directory, config).values())
    if config.init_from.run and not begun:
        check_source(config)
    with run_directory(directory, world, job="train", mlflow=mlflow_target(config, directory)):
        dataset = DatasetEntry(path=config.data.path, fingerprint=fingerprint(config.data.path, data.spec))
        if world.rank == 0:
            begin_run(directory, config, world.size, dataset)
        world.barrier()
        open_log(directory / "logs", world.rank)
        logger.info(describe_precision(config.train.precision, world.device.type))
        data.verify(world)
        if world.rank == 0 and not config.run.directory and (directory / "features").exists():
            logger.info(f"resuming the unfinished run {directory}; resume.enabled=false starts a new one")
        features = open_features(config, data, split, directory / "features", world, open_existing_store)
        job = RankerJob(config, data, split, features, dataset, world, preemption)

        reports: dict[str, Report] = {}
        for kind, model_dir in model_dirs(directory, config).items():
            report = finished_report(model_dir, world) or train_and_evaluate(job, kind, model_dir)
            if report["behaviours"]:
                reports[kind] = report["behaviours"]
        if world.rank == 0:
            write_last_report(directory)
    if reports:
        logger.info("\n" + metrics_table(reports))
    logger.info(f"\nrun: {directory}")
    return reports


def train_and_evaluate(job: RankerJob, kind: RankerKind, model_dir: Path) -> dict[str, Any]:
    """Train one model, from its newest checkpoint if there is one, and evaluate it.

    Returns:
        The content of its ``metrics.json``.
    """
    baseline = "" if kind == job.config.model.kind else kind
    with tracked_baseline(job.config, model_dir, baseline, job.world.rank):
        model = prepare_model(job, kind, model_dir, make_publisher(job.config, model_dir))
        train_model(job, model)
        report, calibration = evaluate_model(job, model)
        return write_results(job, model, report, calibration)


if __name__ == "__main__":
    sys.exit(main())
