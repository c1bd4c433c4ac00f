"""Sparse and dense as one model: TorchRec's sharded tables and DeepSpeed's dense network, trained together.

Between the two runs a cut. The rows of all ids of a step are looked up once; the dense network trains on leaves that
hold them, in as many parts as gradients are accumulated over; the leaves' gradients then go back into the tables in one
exchange. Losses and parameters are those of one process with plain PyTorch, up to rounding:

* the loss of a step is the sum over the rows of all ranks divided by their number, whatever each rank had of them;
* where DeepSpeed clips the dense gradient, the gradient of the tables is scaled by the same factor (the norm is the
  dense one: that of all rows touched would need a collective, and differs by what the tables add to it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.embeddings import Lookup, Table
from modules.losses import masked_bce, report_loss
from modules.ranker import Ranker
from trainer.checkpoint.model_state import State, in_blocks, read_state, write_state
from trainer.config.deepspeed import complete_settings
from trainer.data.loading.batch import RankingBatch
from trainer.engine.batch_pipeline import NOTHING, BatchPipeline, InFlightBatch, StepRequest
from trainer.engine.dense_engine import DenseNetwork, DenseOptimizer
from trainer.engine.history_alignment import Alignment
from trainer.engine.micro_batches import MicroBatch, row_lengths, split_micro_batches
from trainer.runtime.distributed import control_group, local_size
from trainer.runtime.phase_timer import PhaseClock, PhaseSeconds
from trainer.sparse.dynamic_ids import IdCounts
from trainer.sparse.planner import TableOptimizer
from trainer.sparse.sharded_tables import Shard, ShardedTables

Seen = TypeVar("Seen")

__all__ = ["DenseOptimizer", "HybridEngine", "StepResult", "TableOptimizer"]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        batch: this rank's rows; none where it had run out while others had not.
        logits: ``[rows, behaviours]`` float32, predicted before the step learnt from them.
        loss: scalar, weighted binary cross-entropy summed over behaviours, mean over the rows of all ranks.
        alignment: scalar, contrastive loss of the histories without its weight, summed over histories, mean over the
            rows of all ranks; 0 where they are not aligned.
        rows_global: rows of all ranks.
        save: a rank asked for a checkpoint after this step; the same on all ranks.
        stop: a rank asked to end after this step; the same on all ranks.
    """

    batch: RankingBatch
    logits: Tensor
    loss: Tensor
    alignment: Tensor
    rows_global: int
    save: bool
    stop: bool
    laps: PhaseSeconds

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of this rank in each phase (``trainer.runtime.phase_timer``); on a GPU this waits for the step."""
        return self.laps.total()


class NotFiniteLoss(Exception):
    """The loss of a step is NaN or infinite; neither tables nor dense network have learnt from it.

    Attributes:
        step: its number.
        loss: of all ranks.
        batch: of this rank.
        logits: ``[rows, behaviours]`` float32, of this rank.
    """

    def __init__(self, step: int, loss: float, batch: RankingBatch, logits: Tensor) -> None:
        super().__init__(f"the loss of step {step} is {loss}")
        self.step, self.loss, self.batch, self.logits = step, loss, batch, logits


class HybridEngine:
    """A model on the ranks of the default process group (``trainer.runtime.distributed.World.join`` first).

    Args:
        tables: embedding tables.
        lookups: that read them; the keys of the batches' ids.
        ranker: the dense network, ``(rows of lookups, lengths, dense) -> logits``; the first rank's initial values
            count. See ``modules.ranker.Ranker``.
        table_optimizer: of the tables.
        dense_optimizer: of the ranker.
        deepspeed: DeepSpeed's settings as given in its JSON.
        behaviour_weights: ``[behaviours]``, weights of the losses.
        batch_size: rows of one rank in an optimizer step.
        device: of this rank.
        seed: of the tables' initial values, which do not depend on ranks or sharding.
        overlap: exchange the ids of the next batch while the dense network works on this one.
        alignment: of the histories; None for none.
        deduplicate: see :class:`trainer.sparse.sharded_tables.ShardedTables`.

    Attributes:
        plan: where each table lies, see :func:`trainer.sparse.planner.describe_plan`.
        table_optimizer: as given.
        zero_stage: of DeepSpeed.
        steps_done: optimizer steps so far.

    Raises:
        UserError: settings that cannot be combined, with the reason; tables that do not fit into memory.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        lookups: Sequence[Lookup],
        ranker: nn.Module,
        *,
        table_optimizer: TableOptimizer,
        dense_optimizer: DenseOptimizer,
        deepspeed: Mapping[str, Any],
        behaviour_weights: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int,
        overlap: bool = True,
        alignment: Alignment | None = None,
        deduplicate: bool = True,
    ) -> None:
        self._world = dist.get_world_size()
        settings = complete_settings(deepspeed, batch_size, self._world)
        self._control = control_group()
        self._clock = PhaseClock(device)
        self._weights = behaviour_weights.to(device)
        self._fixed_lengths = {lookup.name: lookup.length for lookup in lookups}
        self._overlap = overlap
        self._alignment = alignment
        self._tables = ShardedTables(
            tables,
            lookups,
            table_optimizer,
            device=device,
            local_size=local_size(),
            batch_size=batch_size,
            seed=seed,
            clock=self._clock,
            control=self._control,
            deduplicate=deduplicate,
        )
        self._dense = DenseNetwork(ranker, dense_optimizer, settings, device=device, clock=self._clock)
        self.plan = self._tables.plan
        self.table_optimizer = table_optimizer
        self.zero_stage = self._dense.zero_stage
        self.steps_done = 0

    def set_learning_rate(self, tables: float, dense: float) -> None:
        """Learning rates from the next step on."""
        self._tables.set_learning_rate(tables)
        self._dense.set_learning_rate(dense)

    def steps(
        self, batches: Iterator[RankingBatch], ask: Callable[[int], StepRequest] = lambda step: NOTHING
    ) -> Iterator[StepResult]:
        """Train a step on each batch until all ranks are out of batches. Collective.

        Args:
            batches: of this rank, each the rows of one optimizer step.
            ask: what this rank would have all ranks do after a step, given its number; asked ahead of the step.

        Raises:
            UserError: an id outside its table.
            NotFiniteLoss: on all ranks, before anything has learnt from the step.
        """
        self._dense.module.train()
        pipeline = self._pipeline(batches)
        arriving = pipeline.fetch(ask(self.steps_done + 1))
        arriving.send()
        while arriving.count().ranks:
            embedded = arriving.rows(self.steps_done + 1)
            following = pipeline.fetch(ask(self.steps_done + 2)) if self._overlap else None
            result = self._train(arriving, embedded, following)
            try:
                yield result
            except GeneratorExit:
                if following is not None:
                    following.drain()
                raise
            if following is None:
                following = pipeline.fetch(ask(self.steps_done + 1))
                following.send()
            arriving = following
        arriving.drain()

    def predict(self, batches: Iterator[RankingBatch]) -> Iterator[tuple[RankingBatch, Tensor]]:
        """Batches of this rank with their logits ``[rows, behaviours]`` float32; nothing is trained. Collective.

        A rank that runs out goes on with empty batches until all are out.

        Raises:
            UserError: an id outside its table.
        """
        return self._look(batches, lambda part: self._dense(part.embedded, part.lengths, part.dense).float())

    def attention(self, batches: Iterator[RankingBatch]) -> Iterator[tuple[RankingBatch, dict[str, Tensor]]]:
        """Batches of this rank with the attention of their histories' entries. Collective, as :meth:`predict` is.

        What it gives is that of ``modules.ranker.Ranker.shares``.
        """
        ranker = self._dense.module
        assert isinstance(ranker, Ranker)
        return self._look(batches, lambda part: ranker.shares(part.embedded, part.lengths, part.dense))

    def _look(
        self, batches: Iterator[RankingBatch], look: Callable[[MicroBatch], Seen]
    ) -> Iterator[tuple[RankingBatch, Seen]]:
        self._dense.module.eval()
        pipeline = self._pipeline(batches)
        arriving = pipeline.fetch()
        arriving.send()
        while arriving.count().ranks:
            with torch.no_grad():
                embedded = arriving.rows()
                following = pipeline.fetch()
                following.send()
                (part,) = split_micro_batches(arriving.batch, embedded, self._fixed_lengths, 1)
                seen = look(part)
            self._clock.lap()
            try:
                yield arriving.batch, seen
            except GeneratorExit:
                following.drain()
                raise
            arriving = following
        arriving.drain()

    def save(self, path: str | Path) -> None:
        """Write the whole model and its optimizers to a directory, each rank its shards. Collective.

        Raises:
            UserError: it cannot be written.
        """
        write_state(self.state(copy=False), path, self._control)

    def state(self, *, copy: bool) -> State:
        """What :meth:`save` writes, for ``trainer.checkpoint.model_state.write_state``. Collective.

        It holds no learning rates, which are a function of how much has been trained on.

        Args:
            copy: into host memory, so that training can go on while it is written.
        """
        return in_blocks(self._state(), copy=copy)

    def load(self, path: str | Path) -> None:
        """Continue from :meth:`save`, also of another number of ranks, another plan or ZeRO stage. Collective.

        Raises:
            UserError: there is no model, or another one: what differs is listed.
        """
        state = self._state()
        read_state(state, path, self._control)
        self._tables.loaded(state)
        self.steps_done = int(state["steps"])
        self._dense.load_state(state, self.steps_done)

    @property
    def dense_shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Shapes of the dense network's parameters, and of its buffers, by name."""
        module = self._dense.module
        return (
            {name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
            {name: tuple(buffer.shape) for name, buffer in module.named_buffers()},
        )

    def table_shards(self) -> Iterator[Shard]:
        """This rank's shards of the tables, live."""
        return self._tables.shards()

    def table_optimizer_shards(self) -> Iterator[tuple[str, Shard]]:
        """This rank's shards of the states of the tables' optimizer, live; see :class:`ShardedTables`."""
        return self._tables.optimizer_shards()

    def id_counts(self) -> dict[str, IdCounts]:
        """Dynamic table -> what happened to its ids so far, on all ranks. Collective."""
        return self._tables.dynamic.counts()

    def set_dense_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Give every parameter of the dense network a value, float32; its optimizer stays as it is. Collective."""
        self._dense.set_parameters(values)

    def close(self) -> None:
        """Let go of what libraries keep of the model, so that its memory can be freed."""
        self._dense.close()

    def _pipeline(self, batches: Iterator[RankingBatch]) -> BatchPipeline:
        self._clock.lap()
        return BatchPipeline(batches, self._tables, len(self._weights), self._clock, self._control)

    def _state(self) -> dict[str, Any]:
        return {**self._tables.state(), **self._dense.state(), "steps": torch.tensor(self.steps_done)}

    def _train(
        self, arriving: InFlightBatch, embedded: Mapping[str, Tensor], following: InFlightBatch | None
    ) -> StepResult:
        batch, count = arriving.batch, arriving.count()
        rows = count.rows
        parts = split_micro_batches(batch, embedded, self._fixed_lengths, self._dense.parts)
        aligned, given = self._align(batch, embedded, rows)
        # DeepSpeed divides by ranks and parts what is to be divided by the rows of all ranks.
        scale = self._world * len(parts) / max(rows, 1)
        logits, losses = [], torch.stack([torch.zeros_like(aligned), aligned])
        with self._clock.phase("dense"):
            for part, of_part in zip(parts, given, strict=True):
                for name, leaf in part.embedded.items():
                    leaf.requires_grad_()
                    # The backward pass adds to what the alignment gives.
                    leaf.grad = of_part.get(name)
                logits.append(self._dense(part.embedded, part.lengths, part.dense))
                if part.slow is None:
                    loss, _ = masked_bce(logits[-1], part.label, part.mask, self._weights)
                else:
                    loss, _ = report_loss(logits[-1], part.label, part.mask, part.slow, self._weights)
                losses[0] += loss.detach()
                last = part is parts[-1]
                if last:
                    summed = dist.all_reduce(losses, async_op=True)
                    if following is not None:
                        following.send()
                self._dense.backward(loss * scale, last=last)
        with self._clock.phase("communication"):
            summed.wait()
        losses /= max(rows, 1)
        predicted = torch.cat([part.detach() for part in logits]).float()
        if not torch.isfinite(losses).all():
            raise NotFiniteLoss(self.steps_done + 1, float(losses.sum()), batch, predicted)
        with self._clock.phase("dense"):
            factor = self._dense.step()
        arriving.update({name: [part.gradient(name) for part in parts] for name in embedded}, factor)
        self.steps_done += 1
        loss, alignment = losses.unbind()
        laps = self._clock.lap()
        return StepResult(batch, predicted, loss, alignment, rows, count.save > 0, count.stop > 0, laps)

    def _align(
        self, batch: RankingBatch, embedded: Mapping[str, Tensor], rows: int
    ) -> tuple[Tensor, list[Mapping[str, Tensor]]]:
        """The alignment's loss of this rank, and what it gives to the looked-up rows of each part. Collective."""
        if self._alignment is None:
            return torch.zeros((), device=batch.dense.device), [{}] * self._dense.parts
        with self._clock.phase("dense"):
            lengths = row_lengths(batch, self._fixed_lengths)
            loss, gradients = self._alignment.gradients(embedded, lengths, batch.user_id, self._control)
            # Tables divide by the ranks what is to be divided by the rows of all ranks.
            scaled = {name: gradient.mul_(self._world / max(rows, 1)) for name, gradient in gradients.items()}
            parts = split_micro_batches(batch, scaled, self._fixed_lengths, self._dense.parts)
        return loss, [part.embedded for part in parts]
