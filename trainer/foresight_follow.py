"""Forecast segments in the order of time, and train Foresight's predictor on what became known since.

    limelight foresight follow configs/foresight.toml follow.init_from=runs/foresight run.directory=runs/follow
    torchrun --nproc-per-node 2 -m trainer.foresight_follow configs/foresight.toml

One process runs on every rank. The same command again resumes where the last one stopped, or goes on to the segments
that were added to the code file since.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_directory import begin_run, choose_directory, run_directory
from trainer.checkpoint.tracked_metrics import mlflow_target, write_metrics
from trainer.config.foresight import ForesightConfig, load_foresight_follow
from trainer.config.paths import absolute_paths
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.run_log import open_log, set_step
from trainer.runtime.determinism import use_deterministic_kernels
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.semantic_ids.foresight_follow import (
    FollowCheckpoints,
    RunForecasts,
    follow,
    metrics_document,
    start_state,
)
from trainer.semantic_ids.foresight_follow_data import FollowData
from trainer.semantic_ids.foresight_progressive import progressive_table
from trainer.semantic_ids.foresight_training import deepspeed_settings, start_engine

logger = logging.getLogger("trainer.foresight_follow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.foresight_follow``."""
    options = parse_rank_arguments(
        "trainer.foresight_follow",
        "Forecast segments and train Foresight's predictor in the order of time; one process per rank.",
        TRAIN_ARGUMENTS,
        arguments,
    )

    def job() -> None:
        config = load_foresight_follow(options.config, options.overrides)
        if config.train.deterministic:
            use_deterministic_kernels()
        with World.join(config.train.device, bind_cores=config.train.bind_cores) as world:
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: ForesightConfig, world: World, preemption: Preemption) -> dict[str, Any]:
    """Follow the segments of a code file, and write the run. Returns the content of ``metrics.json``."""
    directory = Path(world.agree(str(choose_directory(config))))
    # The run means the same in every directory; messages up to here are as typed.
    config = absolute_paths(config)
    settings = deepspeed_settings(config, world.size)
    data = FollowData.open(config)
    with run_directory(directory, world, job="foresight follow", mlflow=mlflow_target(config, directory)):
        if world.rank == 0:
            # The checkpoints compare the data, because later segments may be added.
            begin_run(directory, config, world.size)
            # Segments may have been added to those of a finished run.
            (directory / "metrics.json").unlink(missing_ok=True)
        world.barrier()
        open_log(directory / "logs", world.rank)
        if world.rank == 0:
            data.log(config.data.runs)
        engine = start_engine(config, data, settings, world.device, None)
        checkpoints = FollowCheckpoints(directory / "checkpoints", config, data, world)
        state = start_state(data, engine, checkpoints, world)
        set_step(state.step)
        forecasts = RunForecasts(directory, config, data, engine, state.step, world)
        slow = follow(engine, data, state, checkpoints, forecasts, config=config, world=world, preemption=preemption)
        document = metrics_document(config, data, state, slow, checkpoints.stalls)
        if world.rank == 0:
            if document["progressive"]["rows"]:
                logger.info(progressive_table(document["progressive"]))
            if slow:
                logger.warning(f"{slow:,} times the forecasts and steps of some ticks took longer than the ticks")
            write_metrics(directory, document, state.step)
        checkpoints.close()
        engine.close()
    logger.info(f"\nforecasts: {forecasts.directory}\nrun: {directory}")
    return document


if __name__ == "__main__":
    sys.exit(main())
