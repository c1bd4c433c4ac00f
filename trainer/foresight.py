"""Train Foresight's predictor: an author's next code from the latest ones. One process runs on every rank.

limelight foresight configs/foresight.toml --ranks 2
torchrun --nproc-per-node 2 -m trainer.foresight configs/foresight.toml train.epochs=2

The same command again resumes where the last one stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_directory import begin_run, choose_directory, run_directory
from trainer.checkpoint.step_checkpoints import StepState
from trainer.checkpoint.tracked_metrics import mlflow_target, write_metrics
from trainer.config.foresight import ForesightConfig, load_foresight
from trainer.config.paths import absolute_paths
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.run_log import open_log, set_step
from trainer.runtime.determinism import use_deterministic_kernels
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.semantic_ids.foresight_data import ForesightData
from trainer.semantic_ids.foresight_report import evaluate, metrics_document, report_table
from trainer.semantic_ids.foresight_training import (
    ForesightCheckpoints,
    ForesightWindow,
    RowSchedule,
    deepspeed_settings,
    start_engine,
    train,
)

logger = logging.getLogger("trainer.foresight")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.foresight``."""
    options = parse_rank_arguments(
        "trainer.foresight", "Train Foresight's predictor; one process per rank.", TRAIN_ARGUMENTS, arguments
    )

    def job() -> None:
        config = load_foresight(options.config, options.overrides)
        if config.train.deterministic:
            use_deterministic_kernels()
        with World.join(config.train.device, bind_cores=config.train.bind_cores) as world:
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: ForesightConfig, world: World, preemption: Preemption) -> dict[str, Any]:
    """Train a predictor, evaluate it beside the rules, and write the run. Returns the content of ``metrics.json``."""
    directory = Path(world.agree(str(choose_directory(config))))
    # The run means the same in every directory; messages up to here are as typed.
    config = absolute_paths(config)
    settings = deepspeed_settings(config, world.size)
    data = ForesightData.open(config)
    with run_directory(directory, world, job="foresight", mlflow=mlflow_target(config, directory)):
        if world.rank == 0:
            begin_run(directory, config, world.size, data.entry)
        world.barrier()
        open_log(directory / "logs", world.rank)
        if world.rank == 0:
            data.log(config.data.runs)
        engine = start_engine(config, data, settings, world.device, data.target_counts)
        schedule = RowSchedule(data.training, config.train.batch_size, config.train.epochs, config.run.seed)
        state = StepState(schedule.steps, schedule.rows, ForesightWindow())
        checkpoints = ForesightCheckpoints(directory / "checkpoints", config, data, world)
        checkpoints.restore(engine, state)
        set_step(state.step)
        if not state.finished:
            train(engine, data, schedule, state, checkpoints, config=config, world=world, preemption=preemption)

        evaluation = evaluate(engine.predictor, data, config, world)
        if world.rank == 0 and evaluation:
            logger.info(report_table(evaluation))
        document = metrics_document(config, data, state, evaluation, checkpoints.stalls)
        if world.rank == 0:
            write_metrics(directory, document, state.step)
        checkpoints.close()
        engine.close()
    logger.info(f"\nrun: {directory}")
    return document


if __name__ == "__main__":
    sys.exit(main())
