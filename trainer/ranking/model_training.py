"""Training and evaluation of one model of a ranker's job: the job's own network, or a baseline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.ranker import RankerKind
from trainer.checkpoint.manifest import DatasetEntry
from trainer.checkpoint.run_directory import compiled_parts
from trainer.checkpoint.tracked_metrics import write_metrics
from trainer.config.ranker import JobConfig
from trainer.console.run_log import set_step
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.dataset import Dataset
from trainer.engine.hybrid_engine import HybridEngine
from trainer.metrics.behaviour_metrics import Report
from trainer.ranking.attention_examples import ATTENTION_EXAMPLES, HeldOutInputs, write_attention_examples
from trainer.ranking.checkpoints import Checkpoints, Identity
from trainer.ranking.device_histories import DeviceHistories, open_device_histories
from trainer.ranking.evaluation import (
    CalibrationCurves,
    calibration_curve,
    evaluate,
    metrics_document,
    predict,
    read_truth,
)
from trainer.ranking.growing_device_histories import GrowingDeviceHistories, open_growing_histories
from trainer.ranking.held_out_rows import HELD_OUT, write_held_out
from trainer.ranking.metrics_table import metrics_table
from trainer.ranking.search_refresh import SearchSpaceRefresher, make_space
from trainer.ranking.setup import Split, build_engine, freeze_at_end_of_training, held_out_loader, training_loader
from trainer.ranking.stream_train_loop import train_stream
from trainer.ranking.train_loop import train
from trainer.ranking.training_state import TrainingState
from trainer.ranking.training_stream import TrainingStream, open_stream
from trainer.ranking.warm_start import format_taken, warm_start
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.preemption import Preemption
from trainer.runtime.stored_files import read_json_object, stored_value
from trainer.sparse.planner import format_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankerJob:
    """Everything that all models of a job share."""

    config: JobConfig
    data: Dataset
    split: Split
    features: FeatureMap
    dataset: DatasetEntry
    world: World
    preemption: Preemption


@dataclass(frozen=True)
class ModelTraining:
    """One model with the state of its training.

    Attributes:
        kind: network of the model.
        model_dir: directory of the model's files.
        engine: tables and dense network.
        state: progress of the training, from the newest checkpoint or from the start.
        position: read position by partition, to continue from; ``None`` at the start.
        checkpoints: to save to.
        stream: of this rank, if the job trains on a stream.
        space: vectors that histories are searched with, if a search needs any.
        searching: renews ``space`` while the model is trained.
        on_device: histories of the dataset that the device searches; None if the loader searches.
        growing: histories of the stream that the device searches; None if they are searched on the host.
    """

    kind: RankerKind
    model_dir: Path
    engine: HybridEngine
    state: TrainingState
    position: Any
    checkpoints: Checkpoints
    stream: TrainingStream | None
    space: SearchSpace | None
    searching: SearchSpaceRefresher | None
    on_device: DeviceHistories | None
    growing: GrowingDeviceHistories | None


def finished_report(model_dir: Path, world: World) -> dict[str, Any] | None:
    """Return ``metrics.json`` of a model that an earlier start of the job finished, or ``None``. Collective."""
    document = None
    if world.rank == 0 and (model_dir / "metrics.json").exists():
        file = model_dir / "metrics.json"
        document = read_json_object(file)
        stored_value(document, file, "behaviours", dict)
        logger.info(f"{stored_value(document, file, 'model', str)}: finished already, in {model_dir}")
    return world.agree(document)


def prepare_model(
    job: RankerJob, kind: RankerKind, model_dir: Path, after_save: Callable[[Path], None]
) -> ModelTraining:
    """Build a model, and restore it from its newest checkpoint or start it from another run's tables. Collective.

    Args:
        job: the job.
        kind: network of the model.
        model_dir: directory of the model's files.
        after_save: called with the directory of each checkpoint that was written.

    Raises:
        UserError: a checkpoint, the stream's source or the old run of ``init_from`` cannot be read, or does not fit.
    """
    config, features, world = job.config, job.features, job.world
    stream = None if config.stream is None else open_stream(config, job.data, job.split, features, world, model_dir)
    engine = build_engine(config, features, kind, world)
    logger.info(f"{kind}: table placement by TorchRec's planner\n{format_plan(engine.plan)}")
    if kind != "logistic":
        parts = compiled_parts(config)
        logger.info(f"{kind}: {'; '.join(f'{name} by {path}' for name, path in parts.items())}")
    if config.train.compile is True:
        logger.info(f"{kind}: the dense network is compiled by torch.compile, which takes a minute or more at first")
    identity = Identity(config, kind, features.behaviours, job.dataset)
    checkpoints = Checkpoints(model_dir / "checkpoints", identity, world, after_save)
    space = make_space(config, features)
    state = TrainingState.at_start(features.behaviours, stream, space)
    position = checkpoints.restore(engine, state)
    if position is None and config.init_from.run:
        logger.info(format_taken(warm_start(engine, config, kind, features, world)))
    searching = None if space is None else SearchSpaceRefresher(space, config, features, engine, world)
    if searching is not None:
        searching.begin()
    on_device = growing = None
    if stream is None:
        on_device = open_device_histories(config, features, job.data.histories, space, world, engine)
    else:
        growing = open_growing_histories(config, features, stream.histories, space, world, engine)
    if searches := on_device or growing:
        engine.complete = searches.complete
    set_step(state.step)
    return ModelTraining(
        kind, model_dir, engine, state, position, checkpoints, stream, space, searching, on_device, growing
    )


def train_model(job: RankerJob, model: ModelTraining) -> None:
    """Train a model to the end of its data, from the position of its state; nothing is left to do if it is there.

    Collective.

    Raises:
        UserError: there are no rows; the loss is not finite; the stream or a checkpoint cannot be read or written.
        Preempted: a rank was asked to stop, and the state is saved.
    """
    if model.state.finished:
        return
    config, world = job.config, job.world
    if model.stream is not None:
        with model.stream.open(model.position) as reader:
            train_stream(
                model.engine,
                model.stream,
                reader,
                model.state,
                model.checkpoints,
                config=config,
                world=world,
                preemption=job.preemption,
                model_dir=model.model_dir,
                searching=model.searching,
                on_device=model.growing,
            )
        return
    loader = training_loader(
        config,
        job.data,
        job.split,
        job.features,
        world,
        model.position,
        space=model.space,
        first_step=model.state.step,
        left_to=None if model.on_device is None else model.on_device.places,
    )
    train(
        model.engine,
        loader,
        model.state,
        model.checkpoints,
        config=config,
        world=world,
        preemption=job.preemption,
        model_dir=model.model_dir,
        searching=model.searching,
    )


def evaluate_model(job: RankerJob, model: ModelTraining) -> tuple[Report | None, CalibrationCurves]:
    """Evaluate a model on the held-out range: metrics and calibration by behaviour. Collective.

    The predictions of these rows, or of a sample of them, are kept in the directory of the model, with the attention of
    a few of them, if the model has any.

    Returns:
        The metrics, ``None`` if the job holds nothing out, and the calibration curve of each behaviour.
    """
    config, behaviours = job.config, job.features.behaviours
    if job.split.eval_from is None:
        return None, {}
    # Training is over and saved, so the weights of the last step are needed no more.
    model.engine.use_average()
    frozen = freeze_at_end_of_training(config, job.data, job.split)
    left_to = None if (on_device := _searches_of_evaluation(job, model)) is None else on_device.places
    loader = held_out_loader(config, job.data, job.split, job.features, job.world, frozen, model.space, left_to)
    held_out = predict(model.engine, loader, quiet=job.world.rank > 0)
    control = job.world.control
    truth = read_truth(config.data.path, held_out, behaviours)
    report = evaluate(held_out, behaviours, control, truth)
    file = model.model_dir / HELD_OUT
    write_held_out(file, held_out, behaviours, truth, job.data, job.split.held_out, job.world)
    if model.kind != "logistic" and job.features.sequences:
        space = None if model.space is None else model.space.at(model.space.newest)
        limit = None if frozen is None else job.split.train_until
        inputs = HeldOutInputs(job.data, job.split.held_out, job.features, space, frozen, limit)
        write_attention_examples(
            model.model_dir / ATTENTION_EXAMPLES, model.engine, held_out, behaviours, inputs, job.world
        )
    return report, calibration_curve(held_out, behaviours, control)


def _searches_of_evaluation(job: RankerJob, model: ModelTraining) -> DeviceHistories | None:
    """Return the histories of the dataset on the device; held-out rows read them after a stream too. Collective."""
    if model.stream is None:
        return model.on_device
    if model.growing is not None:
        model.growing.release()
    histories = job.data.histories
    found = open_device_histories(job.config, job.features, histories, model.space, job.world, model.engine)
    model.engine.complete = None if found is None else found.complete
    return found


def write_results(
    job: RankerJob, model: ModelTraining, report: Report | None, calibration: CalibrationCurves
) -> dict[str, Any]:
    """Write plan and metrics of a model, and close it. Collective. Returns the content of ``metrics.json``."""
    config, kind, state = job.config, model.kind, model.state
    document = metrics_document(config, kind, report, state.metric_history, model.checkpoints.stalls)
    document["calibration_curves"] = calibration
    if model.stream is not None:
        document["stream"] = model.stream.summary(job.world, state.progressive)
        counts = document["stream"]["counts"]
        if counts["before_start"]:
            logger.info(f"{kind}: skipped {counts['before_start']:,} events from before the start of the stream")
        if document["stream"]["users"] and document["stream"]["users"]["in_two_partitions"]:
            assert model.stream.users is not None
            logger.info(f"{kind}: {model.stream.users.message()}")
        if not document["training"]["rows"]:
            events = counts["events"]
            logger.info(f"{kind}: trained on 0 rows: the stream has ended, and its events ({events:,}) gave no row")
        logger.info(f"predicted as requests came:\n{metrics_table({kind: document['stream']['progressive']})}")
    if job.world.rank == 0:
        write_json(model.model_dir / "plan.json", model.engine.plan)
        write_metrics(model.model_dir, document, state.step)
    model.checkpoints.close()
    model.engine.close()
    return document
