"""Loop over the optimizer steps of a job that has no read position, from its current step to its last one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from trainer.checkpoint.step_checkpoints import StepCheckpoints, StepState
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.run_log import set_step
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted, Preemption
from trainer.runtime.scalars import ScalarWriter
from trainer.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)


class StepDone(NamedTuple):
    """Result of a step.

    Attributes:
        rows: rows of the step, over all ranks.
        loss: mean loss, for the progress line.
    """

    rows: int
    loss: float


class Steps(Protocol):
    """Optimizer steps of a model."""

    def backward(self, step: int) -> Sequence[float]:
        """Accumulate the gradients of this rank's share of a step; return this rank's sums, that of the loss first."""
        ...

    def update(self, sums: Sequence[float]) -> StepDone:
        """Update the parameters, and add the step to the window of the state; ``sums`` are those of all ranks."""
        ...

    def record(self) -> Mapping[str, float]:
        """Append the window to the metric history, and begin a new one. Returns its scalars."""
        ...

    def save(self, *, wait: bool) -> None:
        """Save a checkpoint; ``wait`` until it is on disk."""
        ...


def run_steps(
    steps: Steps,
    state: StepState[Any],
    checkpoints: StepCheckpoints,
    *,
    title: str,
    unit: str,
    model: str,
    log_every: int,
    watchdog_seconds: float,
    world: World,
    preemption: Preemption,
    scalars: ScalarWriter | None = None,
) -> None:
    """Run the remaining optimizer steps.

    Args:
        steps: the steps of the model.
        state: progress of training; updated in place.
        checkpoints: checkpoint store; saved to in intervals, at the end, and when the job is asked to stop.
        title, unit: of the progress line, such as ``finetune`` and ``sequences``.
        model: name of what is trained, for a message.
        log_every: steps between two records of the metric history.
        watchdog_seconds: the job ends if a rank finishes no step for this long; 0 for no limit.
        world: ranks of the job.
        preemption: stop request of this process.
        scalars: writer of the scalars of each record, on the first rank.

    Raises:
        UserError: the loss is not finite, or a checkpoint cannot be written.
        Preempted: a rank was asked to stop; the state is saved.
    """
    logger.info(world.placement)
    quiet = world.rank > 0
    with (
        preemption.deferred(),
        Watchdog(world, watchdog_seconds) as watchdog,
        Progress(title, state.rows_total, unit, done=state.rows_done, quiet=quiet) as progress,
    ):
        while state.step < state.steps_total:
            own = steps.backward(state.step)

            # One all-reduce per step carries the sums, and the requests to save or to stop.
            *sums, save, stop = _summed([*own, checkpoints.is_due(state.step + 1), preemption.asked], world)
            if not math.isfinite(sums[0]):
                raise UserError(
                    f"the loss of step {state.step + 1} is not finite; the {model} was not updated with it, and the "
                    "same command resumes from the last checkpoint"
                )
            done = steps.update(sums)

            state.step += 1
            state.rows_done += done.rows
            set_step(state.step)
            if state.step % log_every == 0 or state.step == state.steps_total:
                values = steps.record()
                if scalars is not None:
                    for name, value in values.items():
                        scalars.add_scalar(name, value, state.step)
            progress.advance(done.rows, f"step {state.step}/{state.steps_total}, loss {done.loss:.4f}")
            checkpoints.check()
            # The last step has its own save after the loop.
            if stop or (save and state.step < state.steps_total):
                if scalars is not None:
                    scalars.flush()
                with watchdog.busy("saving a checkpoint"):
                    steps.save(wait=bool(stop))
            if stop:
                raise Preempted
            watchdog.beat(state.step)
        with watchdog.busy("saving the last checkpoint"):
            state.finished = True
            steps.save(wait=True)


def _summed(values: Sequence[float], world: World) -> list[float]:
    """Return the sums of values over the ranks, through the memory of the hosts. Collective."""
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, group=world.control)
    return reduced.tolist()
