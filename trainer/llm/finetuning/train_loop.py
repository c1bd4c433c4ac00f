"""Training loop of a fine-tuning run, from its current step to its last one."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from trainer.config.finetune import FinetuneConfig
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.run_log import set_step
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.checkpoints import AdapterCheckpoints
from trainer.llm.finetuning.packed_batch import TokenBatch, answer_weights
from trainer.llm.finetuning.packing import Packs, Schedule, share_of_rank
from trainer.llm.finetuning.token_files import Tokens
from trainer.llm.finetuning.training_state import FinetuneState, LossWindow
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted, Preemption
from trainer.runtime.watchdog import Watchdog


def train(
    engine: AdapterEngine,
    tokens: Tokens,
    schedule: Schedule,
    state: FinetuneState,
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
        checkpoints: checkpoint store; saved to in intervals, at the end, and when the job is asked to stop.
        config: the job.
        world: ranks of the job.
        preemption: stop request of this process.

    Raises:
        UserError: the loss is not finite, or a checkpoint cannot be written.
        Preempted: a rank was asked to stop; the state is saved.
    """
    quiet = world.rank > 0
    with (
        preemption.deferred(),
        Watchdog(world, config.train.watchdog_seconds) as watchdog,
        Progress("finetune", state.sequences_total, "sequences", done=state.sequences_done, quiet=quiet) as progress,
    ):
        while state.step < state.steps_total:
            packs = schedule.step(state.step)
            rate = learning_rate(config, state)
            engine.set_learning_rate(rate)
            batches = batches_of(packs, tokens, config, world, engine.parts)
            answer_tokens = tokens.answers[np.concatenate(packs)]
            answers = int(answer_tokens.sum())
            weight = float(answer_weights(answer_tokens, config.train.answer_weight).sum())
            loss = engine.backward(batches, weight)

            # One all-reduce per step carries the loss, the padded size, and the requests to save or to stop.
            requests = checkpoints.is_due(state.step + 1), preemption.asked
            sums = torch.tensor([loss, sum(batch.ids.numel() for batch in batches), *requests], dtype=torch.float64)
            dist.all_reduce(sums, group=world.control)
            loss, places, save, stop = sums.tolist()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of step {state.step + 1} is not finite; the adapter was not updated with it, and the "
                    "same command resumes from the last checkpoint"
                )
            engine.step()

            state.step += 1
            state.sequences_done += len(packs)
            state.window.add(loss, answers, sum(int(tokens.lengths[samples].sum()) for samples in packs), round(places))
            set_step(state.step)
            if state.step % config.train.log_every == 0 or state.step == state.steps_total:
                state.metric_history.append(state.window.entry(state.step, rate))
                state.window = LossWindow()
            progress.advance(len(packs), f"step {state.step}/{state.steps_total}, loss {loss / answers:.4f}")
            checkpoints.check()
            # The last step has its own save after the loop.
            if stop or (save and state.step < state.steps_total):
                with watchdog.busy("saving a checkpoint"):
                    checkpoints.save(engine, state, wait=bool(stop))
            if stop:
                raise Preempted
            watchdog.beat(state.step)
        with watchdog.busy("saving the last checkpoint"):
            state.finished = True
            checkpoints.save(engine, state, wait=True)


def learning_rate(config: FinetuneConfig, state: FinetuneState) -> float:
    """Return the learning rate of the next step, as a function of steps done and total steps only."""
    optimizer = config.optimizer
    return optimizer.learning_rate * learning_rate_factor(
        state.step, state.steps_total, optimizer.warmup, optimizer.decay
    )


def batches_of(packs: Packs, tokens: Tokens, config: FinetuneConfig, world: World, parts: int) -> list[TokenBatch]:
    """Return this rank's micro-batches of a step."""
    shares = share_of_rank(packs, batch_size=config.train.batch_size, rank=world.rank, world=world.size, parts=parts)
    return [TokenBatch.of(share, tokens, world.device, weight=config.train.answer_weight) for share in shares]
