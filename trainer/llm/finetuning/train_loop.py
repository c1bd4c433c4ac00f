"""Training of a fine-tuning run, from its current step to its last one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.checkpoint.step_checkpoints import StepState
from trainer.config.finetune import FinetuneConfig
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.engine.step_loop import StepDone, run_steps
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.checkpoints import AdapterCheckpoints
from trainer.llm.finetuning.packed_batch import TokenBatch, answer_weights
from trainer.llm.finetuning.packing import Packs, Schedule, share_of_rank
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.finetuning.training_state import LossWindow
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.runtime.tracking import tracked_run


def train(
    engine: AdapterEngine,
    tokens: Tokens,
    schedule: Schedule,
    state: StepState[LossWindow],
    checkpoints: AdapterCheckpoints,
    *,
    config: FinetuneConfig,
    world: World,
    preemption: Preemption,
) -> None:
    """Run the remaining optimizer steps.

    Args:
        engine: engine that holds the model with its adapter.
        tokens: tokens of all samples.
        schedule: sequences of each step.
        state: progress of training; updated in place.
        checkpoints: checkpoint store.
        config: the job.
        world: ranks of the job.
        preemption: stop request of this process.

    Raises:
        UserError: the loss is not finite, or a checkpoint cannot be written.
        Preempted: a rank was asked to stop; the state is saved.
    """
    run_steps(
        _AdapterSteps(engine, tokens, schedule, state, checkpoints, config, world),
        state,
        checkpoints,
        title="finetune",
        unit="sequences",
        model="adapter",
        log_every=config.train.log_every,
        watchdog_seconds=config.train.watchdog_seconds,
        world=world,
        preemption=preemption,
        scalars=tracked_run(),
    )


class _AdapterSteps:
    """Optimizer steps of an adapter; the arguments are those of :func:`train`."""

    def __init__(
        self,
        engine: AdapterEngine,
        tokens: Tokens,
        schedule: Schedule,
        state: StepState[LossWindow],
        checkpoints: AdapterCheckpoints,
        config: FinetuneConfig,
        world: World,
    ) -> None:
        self._engine, self._tokens, self._schedule, self._state = engine, tokens, schedule, state
        self._checkpoints, self._config, self._world = checkpoints, config, world
        self._packs: Packs = []
        self._rate = 0.0

    def backward(self, step: int) -> Sequence[float]:
        """Return the sum of the losses, and the padded size of this rank's batches."""
        self._packs = self._schedule.step(step)
        self._rate = learning_rate(self._config, self._state)
        self._engine.set_learning_rate(self._rate)
        batches = batches_of(self._packs, self._tokens, self._config, self._world, self._engine)
        answer_tokens = self._tokens.answers[np.concatenate(self._packs)]
        weight = float(answer_weights(answer_tokens, self._config.train.answer_weight).sum())
        return self._engine.backward(batches, weight), sum(batch.ids.numel() for batch in batches)

    def update(self, sums: Sequence[float]) -> StepDone:
        """Update the adapter."""
        self._engine.step()
        loss, places = sums
        answers = int(self._tokens.answers[np.concatenate(self._packs)].sum())
        tokens = sum(int(self._tokens.lengths[samples].sum()) for samples in self._packs)
        self._state.window.add(loss, answers, tokens, round(places))
        return StepDone(len(self._packs), loss / answers)

    def record(self) -> dict[str, float]:
        """Append a record of the metric history. Returns its scalars."""
        entry = self._state.window.entry(self._state.step, self._rate)
        self._state.metric_history.append(entry)
        self._state.window = LossWindow()
        return {name: entry[name] for name in ("loss", "learning_rate", "tokens_per_second")}

    def save(self, *, wait: bool) -> None:
        """Save a checkpoint."""
        self._checkpoints.save(self._engine, self._state, wait=wait)


def learning_rate(config: FinetuneConfig, state: StepState[LossWindow]) -> float:
    """Return the learning rate of the next step, as a function of steps done and total steps only."""
    optimizer = config.optimizer
    return optimizer.learning_rate * learning_rate_factor(
        state.step, state.steps_total, optimizer.warmup, optimizer.decay
    )


def batches_of(
    packs: Packs, tokens: Tokens, config: FinetuneConfig, world: World, engine: AdapterEngine
) -> list[TokenBatch]:
    """Return this rank's micro-batches of a step."""
    shares = share_of_rank(
        packs, batch_size=config.train.batch_size, rank=world.rank, world=world.size, parts=engine.parts
    )
    weight = config.train.answer_weight
    return [TokenBatch.of(share, tokens, world.device, multiple=engine.row_multiple, weight=weight) for share in shares]
