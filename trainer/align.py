"""Align authors with users by LARM's two towers, and evaluate retrieval. One process of this module runs per rank.

    limelight align configs/align.toml --ranks 2
    torchrun --nproc-per-node 2 -m trainer.align configs/align.toml train.epochs=2

The same command with the same overrides resumes an unfinished run. At the end, ``RUN/authors`` has the fused author
vector of each segment; ``limelight align encode`` makes those of later segments.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import ALIGN, DatasetEntry
from trainer.checkpoint.run_directory import begin_run, choose_directory, run_directory, settled
from trainer.checkpoint.tracked_metrics import mlflow_target, write_metrics
from trainer.config.align import AlignConfig, load_align
from trainer.config.precision import describe_precision
from trainer.console.job_arguments import TRAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.run_log import open_log, set_step
from trainer.data.format.dataset import Dataset, fingerprint
from trainer.ranking.checkpoints import Checkpoints, Identity
from trainer.ranking.evaluation import training_summary
from trainer.ranking.setup import fit_once, held_out_loader, split_in_time, training_loader
from trainer.ranking.train_loop import train
from trainer.ranking.training_state import TrainingState
from trainer.runtime.determinism import use_deterministic_kernels
from trainer.runtime.distributed import World, run_rank
from trainer.runtime.files import write_json
from trainer.runtime.preemption import Preemption, until_preempted
from trainer.semantic_ids import align_model
from trainer.semantic_ids.align_content import AuthorContent, content_scale
from trainer.semantic_ids.align_encode import encode_segments
from trainer.semantic_ids.align_evaluation import Rooms, evaluate_held_out, retrieval_table
from trainer.sparse.planner import format_plan

logger = logging.getLogger("trainer.align")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.align``."""
    options = parse_rank_arguments("trainer.align", "Align authors; one process per rank.", TRAIN_ARGUMENTS, arguments)

    def job() -> None:
        config = load_align(options.config, options.overrides)
        if config.train.deterministic:
            use_deterministic_kernels()
        with World.join(config.train.device, bind_cores=config.train.bind_cores) as world:
            run_job(config, world, Preemption())

    return run_rank(lambda: until_preempted(job))


def run_job(config: AlignConfig, world: World, preemption: Preemption) -> dict[str, Any]:
    """Train the towers of a job, evaluate them, and write the run. Returns the content of ``metrics.json``."""
    directory = Path(world.agree(str(choose_directory(config))))
    config = settled(config, directory, world)
    data = Dataset.open(config.data.path, config.data.on_corrupt)
    split = split_in_time(config, data.spec)
    align_model.check_alignment(config, data.spec, world.size)
    segments = align_model.open_segments(config, data)
    scale = content_scale(segments, split.train_until)
    rooms = Rooms.read(config.data.path) if config.data.eval_from else None
    with run_directory(directory, world, job="align", mlflow=mlflow_target(config, directory)):
        counted = align_model.count_positives(config, data, split.training, directory, world)
        dataset = DatasetEntry(path=config.data.path, fingerprint=fingerprint(config.data.path, data.spec))
        if world.rank == 0:
            begin_run(directory, config, world.size, dataset)
        world.barrier()
        open_log(directory / "logs", world.rank)
        logger.info(describe_precision(config.train.precision, world.device.type))
        data.verify(world)
        if finished := align_model.finished_metrics(directory, world):
            return finished
        content = world.on_first_rank(lambda: align_model.store_content(config, segments, scale, directory))
        popularity = align_model.store_positives(counted, directory, world)
        fitted = fit_once(config, data, split, directory / "features", world, {}, {})
        features = align_model.make_features(
            config, data.spec, fitted, AuthorContent(segments, content.scale), popularity
        )
        engine = align_model.build_engine(config, features, world)
        logger.info(f"table placement by TorchRec's planner\n{format_plan(engine.plan)}")
        identity = Identity(config, ALIGN, features.positives, dataset)
        checkpoints = Checkpoints(directory / "checkpoints", identity, world)
        state = TrainingState.at_start(())
        position = checkpoints.restore(engine, state)
        set_step(state.step)
        if not state.finished:
            loader = training_loader(config, data, split, features, world, position)
            options: dict[str, Any] = {
                "config": config,
                "world": world,
                "preemption": preemption,
                "model_dir": directory,
            }
            train(engine, loader, state, checkpoints, **options)
        retrieval: dict[str, Any] = {}
        if rooms is not None:
            held_out = held_out_loader(config, data, split, features.evaluated(), world, None)
            retrieval = evaluate_held_out(engine, held_out, data, features.evaluated(), rooms, config, world, directory)
            logger.info("\n" + retrieval_table(retrieval))
        model = align_model.TrainedAlignment.of(directory, config, data, features, engine)
        logger.info(f"{directory / 'authors'}: {encode_segments(model, directory / 'authors', world)}")
        training = training_summary(state.metric_history, checkpoints.stalls)
        document = align_model.metrics_document(config, features, retrieval, training)
        if world.rank == 0:
            write_json(directory / "plan.json", engine.plan)
            write_metrics(directory, document, state.step)
        checkpoints.close()
        engine.close()
    logger.info(f"\nrun: {directory}")
    return document


if __name__ == "__main__":
    sys.exit(main())
