"""The training loop of one model, from its present position to the last row."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.config.align import EngineJob
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.run_log import set_step
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.loading.loader import Loader
from trainer.engine.build_engine import rows_per_rank
from trainer.engine.hybrid_engine import HybridEngine, NotFiniteLoss, StepResult
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.ranking.checkpoints import Checkpoints, step_request
from trainer.ranking.evaluation import log_missing
from trainer.ranking.search_refresh import SearchSpaceRefresher
from trainer.ranking.setup import require_training_rows
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.phase_timer import PHASES
from trainer.runtime.preemption import Preempted, Preemption
from trainer.runtime.scalars import ScalarWriter, open_scalars
from trainer.runtime.watchdog import Watchdog
from trainer.sparse.dynamic_ids import IdCounts

logger = logging.getLogger(__name__)


def train(
    engine: HybridEngine,
    loader: Loader,
    state: TrainingState,
    checkpoints: Checkpoints,
    *,
    config: EngineJob,
    world: World,
    preemption: Preemption,
    model_dir: Path,
    searching: SearchSpaceRefresher | None = None,
) -> None:
    """Run optimizer steps until all ranks are out of rows; each batch is predicted before the step that trains on it.

    Args:
        engine: the model.
        loader: of this rank, at the position of ``state``.
        state: of the training so far; updated.
        checkpoints: to save to: in intervals, on a request to stop, and at the end.
        config: the job.
        world: the ranks.
        preemption: tells if this process was asked to stop.
        model_dir: directory of the model's files.
        searching: renews the search vectors of the histories.

    Raises:
        UserError: the training range has no rows, the loss is not finite, or a checkpoint cannot be written.
        Preempted: a rank was asked to stop, and the state is saved.
    """
    state.rows_total = world.sum(loader.rows_total)
    require_training_rows(config, state.rows_total)
    left = -(-(loader.rows_total - loader.rows_done) // rows_per_rank(config, world.size))
    steps_total = state.step + world.max(left)
    state.position = loader.position
    missing, first_entry = MissingTally(), True
    scalars = None
    if world.rank == 0:
        # Steps after the checkpoint are repeated, and so are their scalars.
        scalars = open_scalars(model_dir / "tensorboard", state.step)

    def write(entry: dict[str, Any]) -> None:
        if scalars is not None:
            write_scalars(scalars, entry)

    def record(result: StepResult, step: int, ids: dict[str, IdCounts] | None) -> None:
        nonlocal first_entry
        values = result.values
        state.predicted(values.user_id, values.logits, values.label, values.mask)
        missing.add(result.batch.missing_with(values.searched_missing))
        if ids is not None:
            if first_entry and step < steps_total:
                # Early, since codes of other rooms or times are a mistake that no other line shows.
                for message in missing.messages():
                    logger.info(f"step {step:,}: {message}")
            first_entry = False
            state.record_entry(step, ids, {}, write)
        progress.advance(result.rows_read, f"step {step}/{steps_total}, loss {values.loss:.4f}")

    with (
        preemption.deferred(),
        Watchdog(world, config.train.watchdog_seconds) as watchdog,
        Progress("train", state.rows_total, "rows", done=state.rows_done, quiet=world.rank > 0) as progress,
        state.recording(engine, world),
    ):
        _set_learning_rate(engine, config, state)
        try:
            for result in engine.steps(iter(loader), step_request(checkpoints, lambda: preemption.asked)):
                state.advance(result)
                set_step(state.step)
                if searching is not None:
                    with watchdog.busy("renewing the search vectors"):
                        searching.after_step(state.step)
                due = state.step % config.train.log_every == 0 or state.step == steps_total
                # Dynamic tables admit ids of the next step before the values of this one are read.
                ids = engine.id_counts() if due else None
                state.when_read(partial(record, result, state.step, ids))
                _set_learning_rate(engine, config, state)
                checkpoints.check()
                # The last step is saved below, with the state marked as finished.
                if result.stop or (result.save and state.step < steps_total):
                    state.settle()
                    if scalars is not None:
                        scalars.flush()
                    with watchdog.busy("saving a checkpoint"):
                        checkpoints.save(engine, state, wait=result.stop)
                if result.stop:
                    raise Preempted
                watchdog.beat(state.step)
            state.settle()
        except NotFiniteLoss as stopped:
            raise UserError(keep_batch(stopped, model_dir, world.rank)) from None
        with watchdog.busy("saving the last checkpoint"):
            if searching is not None:
                searching.finish()
            state.finished = True
            checkpoints.save(engine, state, wait=True)
    log_missing("train", missing, engine.control)
    for table, counts in engine.id_counts().items():
        logger.info(f"ids of {table}: {counts}")
    if scalars is not None:
        scalars.close()


def _set_learning_rate(engine: HybridEngine, config: EngineJob, state: TrainingState) -> None:
    schedule, rows = config.optimizer, config.train.batch_size
    factor = learning_rate_factor(state.rows_done / rows, state.rows_total / rows, schedule.warmup, schedule.decay)
    engine.set_learning_rate(config.tables.learning_rate * factor, schedule.learning_rate * factor)


def keep_batch(stopped: NotFiniteLoss, model_dir: Path, rank: int) -> str:
    """Write this rank's batch of a step without a finite loss; returns the message for the user."""
    directory = model_dir / "not-finite" / f"step-{stopped.step:08d}"
    batch = stopped.batch
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "ids": [
                {key: (keyed[key].values(), keyed[key].lengths()) for key in keyed.keys()}  # noqa: SIM118
                for keyed in batch.ids
            ],
            **{name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)},
            "content": {name: (of_table.vectors, of_table.places) for name, of_table in batch.content.items()},
            "logits": stopped.logits,
            "loss": stopped.loss,
        },
        directory / f"rank-{rank:05d}.pt",
    )
    return (
        f"{stopped}; no weight was updated, and the rows of each rank are in {directory}; the same command resumes "
        "from the last checkpoint"
    )


def write_scalars(scalars: ScalarWriter, entry: dict[str, Any]) -> None:
    """Write an entry of the metric history as TensorBoard scalars."""
    step = entry["step"]
    for name in ("loss", "alignment", "rows_per_second"):
        scalars.add_scalar(name, entry[name], step)
    for phase in PHASES:
        scalars.add_scalar(f"seconds/{phase}", entry[phase], step)
    for metric in ("auc", "gauc"):
        for behaviour, value in entry[metric].items():
            if value is not None:
                scalars.add_scalar(f"progressive_{metric}/{behaviour}", value, step)
    for table, counts in entry["ids"].items():
        for name, value in counts.items():
            scalars.add_scalar(f"ids_{name}/{table}", value, step)
