"""Hybrid engine: TorchRec's sharded tables and DeepSpeed's dense network, trained together as one model.

Autograd is cut between the two. The rows of all ids of a step are looked up once. The dense network trains on leaf
tensors that hold these rows, one micro-batch after the other. The leaves' gradients are then sent back to the tables in
one exchange. Losses and parameters equal those of one process with plain PyTorch, up to rounding:

* the loss of a step is the sum over the rows of all ranks divided by their number, however the ranks share them;
* where DeepSpeed clips the dense gradient, the gradient of the tables is scaled by the same factor. The norm is that of
  the dense gradient alone: the norm over the tables' rows as well would need one more collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from trainer.checkpoint.model_state import State, in_blocks, read_state, write_state
from trainer.checkpoint.snapshot_memory import SnapshotMemory
from trainer.config.deepspeed import SETTINGS, complete_settings
from trainer.data.features.packed_batch import ContentLayout
from trainer.data.loading.batch import RankingBatch
from trainer.engine.batch_pipeline import NO_REQUEST, BatchPipeline, InFlightBatch, StepRequest
from trainer.engine.dense_engine import DenseNetwork, DenseOptimizer
from trainer.engine.history_alignment import Alignment
from trainer.engine.micro_batches import MicroBatch, row_lengths, split_micro_batches
from trainer.engine.step_loss import StepLoss
from trainer.runtime.distributed import control_group, local_size
from trainer.runtime.host_copy import HostCopy
from trainer.runtime.phase_timer import PhaseClock, PhaseSeconds
from trainer.sparse.dynamic_ids import IdCounts
from trainer.sparse.planner import TableOptimizer
from trainer.sparse.sharded_tables import Shard, ShardedTables

Output = TypeVar("Output")

__all__ = ["DenseOptimizer", "HybridEngine", "StepResult", "TableOptimizer"]


@dataclass(frozen=True)
class StepResult:
    """Result of one training step.

    Attributes:
        number: number of the step, from 1.
        batch: this rank's rows; empty if this rank has no more batches but another one has.
        logits: ``[rows, behaviours]`` float32, predicted before the step trained on these rows; ``[rows, width]``, the
            output of another network than a ranker.
        loss: scalar, mean over the rows of all ranks; of a ranker the weighted binary cross-entropy summed over
            behaviours.
        alignment: scalar, contrastive loss of the histories without its weight, summed over histories, mean over the
            rows of all ranks; 0 if the histories are not aligned.
        rows_global: number of rows of all ranks.
        left_out_global: rows of all ranks that were read, and are no rows of the batch.
        save: True if a rank requested a checkpoint after this step; the same on all ranks.
        stop: True if a rank requested to end after this step; the same on all ranks.
        laps: time of this rank in each phase, see :attr:`seconds`.
        copies: copies for :attr:`values`.
    """

    number: int
    batch: RankingBatch
    logits: Tensor
    loss: Tensor
    alignment: Tensor
    rows_global: int
    left_out_global: int
    save: bool
    stop: bool
    laps: PhaseSeconds
    copies: HostCopy

    @cached_property
    def values(self) -> StepValues:
        """Values of the step on the host; on a GPU this waits for the step."""
        return StepValues(*self.copies.read())

    @property
    def rows_read(self) -> int:
        """Number of rows of all ranks that were read for the step."""
        return self.rows_global + self.left_out_global

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of this rank in each phase of ``trainer.runtime.phase_timer``; on a GPU this waits for the step."""
        return self.laps.total()


class StepValues(NamedTuple):
    """Values of a step on the host.

    Attributes:
        losses: ``[2]``, loss and alignment of the result.
        logits: logits of the result.
        user_id, label, mask, searched_missing: those of the batch.
    """

    losses: Tensor
    logits: Tensor
    user_id: Tensor
    label: Tensor
    mask: Tensor
    searched_missing: Tensor | None = None

    @property
    def loss(self) -> float:
        """Loss of the result."""
        return float(self.losses[0])

    @property
    def alignment(self) -> float:
        """Alignment of the result."""
        return float(self.losses[1])


class NotFiniteLoss(Exception):
    """The loss of a step is NaN or infinite; neither the tables nor the dense network were trained on it or later.

    Attributes:
        step: number of the step.
        loss: loss over all ranks.
        batch: batch of this rank.
        logits: ``[rows, behaviours]`` float32, of this rank.
    """

    def __init__(self, step: int, loss: float, batch: RankingBatch, logits: Tensor) -> None:
        super().__init__(f"the loss of step {step} is {loss}")
        self.step, self.loss, self.batch, self.logits = step, loss, batch, logits


class HybridEngine:
    """Model on the ranks of the default process group; call ``trainer.runtime.distributed.World.join`` first.

    Args:
        tables: embedding tables.
        lookups: lookups that read the tables; the keys of the batches' ids.
        ranker: the dense network, ``(rows of lookups, lengths, dense) -> logits``, and with ``content`` its vectors as
            a fourth argument; all ranks start from the initial values of the first rank. See ``modules.ranker.Ranker``.
        table_optimizer: optimizer of the tables.
        dense_optimizer: optimizer of the ranker.
        deepspeed: DeepSpeed's settings as given in its JSON.
        loss: loss of the network's outputs.
        batch_size: rows of one rank in an optimizer step.
        device: device of this rank.
        seed: seed of the tables' initial values, which do not depend on ranks or sharding.
        overlap: exchange the ids of the next batch while the dense network works on this one.
        alignment: alignment of the histories; None for none.
        deduplicate: see :class:`trainer.sparse.sharded_tables.ShardedTables`.
        deepspeed_file: file that the DeepSpeed settings come from, for messages.
        content: tables of pre-trained vectors that the batches have vectors of.
        read_later: find out if a loss is finite when the next step is queued, so that the host does not wait for the
            device. Until then the device itself leaves out all updates from the step on. False: find out at once. None:
            later on a GPU, at once on a CPU, where nothing waits.
        averaged: keep a mean of the dense network's parameters over time, see :meth:`average`.
        device_form: see :class:`trainer.sparse.sharded_tables.ShardedTables`.
        compiler: see :class:`trainer.engine.dense_engine.DenseNetwork`.

    Attributes:
        control: a gloo group of all ranks.
        plan: placement of each table, see :func:`trainer.sparse.planner.describe_plan`.
        table_optimizer: as given.
        reads_later: True if losses are read when the next step is queued.
        zero_stage: DeepSpeed's ZeRO stage.
        steps_done: number of optimizer steps so far.
        complete: makes, on the stream that batches are copied on, the searches that they leave to the device; None if
            they leave none. The loader and this function belong together, so it is set beside the loader.
        copy_stream: CUDA stream that all batches are copied on; None without a GPU.

    Raises:
        UserError: settings that cannot be combined, with the reason; or tables that do not fit into memory.
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
        loss: StepLoss,
        batch_size: int,
        device: torch.device,
        seed: int,
        overlap: bool = True,
        alignment: Alignment | None = None,
        deduplicate: bool = True,
        deepspeed_file: str = SETTINGS,
        content: Sequence[ContentLayout] = (),
        read_later: bool | None = None,
        averaged: bool = False,
        device_form: bool | None = None,
        compiler: str | None = None,
    ) -> None:
        group = dist.group.WORLD
        assert group is not None
        self._group = group
        self._world = dist.get_world_size(group)
        settings = complete_settings(deepspeed, batch_size, self._world, origin=deepspeed_file)
        self.control = control_group()
        self._clock, self._snapshot = PhaseClock(device), SnapshotMemory()
        self._loss = loss
        self._fixed_lengths = {lookup.name: lookup.length for lookup in lookups}
        self._overlap = overlap
        self._alignment, self._content = alignment, tuple(content)
        self._tables = ShardedTables(
            tables,
            lookups,
            table_optimizer,
            device=device,
            local_size=local_size(),
            batch_size=batch_size,
            seed=seed,
            clock=self._clock,
            control=self.control,
            deduplicate=deduplicate,
            device_form=device_form,
        )
        self._dense = DenseNetwork(
            ranker,
            dense_optimizer,
            settings,
            device=device,
            clock=self._clock,
            origin=deepspeed_file,
            averaged=averaged,
            compiler=compiler,
        )
        self.plan = self._tables.plan
        self.table_optimizer = table_optimizer
        self.zero_stage = self._dense.zero_stage
        self.steps_done = 0
        self.complete: Callable[[RankingBatch], RankingBatch] | None = None
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reads_later = device.type == "cuda" if read_later is None else read_later
        # True while all losses so far are finite; read on the device only.
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._unread: StepResult | None = None

    def set_learning_rate(self, tables: float, dense: float) -> None:
        """Set the learning rates, from the next step on."""
        self._tables.set_learning_rate(tables)
        self._dense.set_learning_rate(dense)

    def average(self, elapsed: float) -> None:
        """Add the dense parameters to their mean, if the engine keeps one; see :class:`WeightAverage`."""
        if self._dense.average is not None:
            self._dense.average.add(elapsed)

    def use_average(self) -> None:
        """Replace the dense parameters by their mean, if the engine keeps one, to predict only. Collective."""
        if self._dense.average is not None:
            self._dense.set_parameters(self._dense.average.values)

    def steps(
        self, batches: Iterator[RankingBatch], request: Callable[[int], StepRequest] = lambda step: NO_REQUEST
    ) -> Iterator[StepResult]:
        """Train one step on each batch until no rank has batches left. Collective.

        Args:
            batches: batches of this rank, each the rows of one optimizer step.
            request: returns this rank's request for the end of a step, given the step's number; called before the step.

        Raises:
            UserError: an id is outside its table.
            NotFiniteLoss: raised on all ranks, with nothing trained on the step: instead of the step's result, or, if
                losses are read later, of that of the next step. A step with ``save`` or ``stop`` is never yielded
                before its own loss is read.
        """
        self._check_last_loss()
        self._dense.module.train()
        pipeline = self._pipeline(batches)
        current = pipeline.fetch(request(self.steps_done + 1))
        current.start()
        current.send()
        while current.totals().ranks:
            embedded = current.rows(self.steps_done + 1)
            following = None
            if self._overlap:
                following = pipeline.fetch(request(self.steps_done + 2))
                following.start()
            result = self._train(current, embedded, following)
            if self.reads_later:
                self._check_last_loss()
                self._unread = result
                if result.save or result.stop:
                    self._check_last_loss()
            try:
                yield result
            except GeneratorExit:
                # All ranks stop after the same step, so all of them complete the exchange of the next batch.
                if following is not None:
                    following.drain()
                raise
            if following is None:
                following = pipeline.fetch(request(self.steps_done + 1))
                following.start()
                following.send()
            current = following
        current.drain()
        self._check_last_loss()

    def predict(self, batches: Iterator[RankingBatch]) -> Iterator[tuple[RankingBatch, Tensor]]:
        """Yield batches of this rank with their logits ``[rows, behaviours]`` float32, without training. Collective.

        A rank without more batches goes on with empty ones until no rank has any.

        Raises:
            UserError: an id is outside its table.
        """
        return self._forward(batches, lambda part: self._dense(*part.inputs).float())

    def attention(self, batches: Iterator[RankingBatch]) -> Iterator[tuple[RankingBatch, dict[str, Tensor]]]:
        """Yield batches of this rank with the attention weights of their histories' entries. Collective.

        The weights are those of ``modules.ranker.Ranker.attention_weights``; ranks take part as in :meth:`predict`.
        """
        ranker = self._dense.module
        assert isinstance(ranker, Ranker)
        return self._forward(batches, lambda part: ranker.attention_weights(*part.inputs))

    def _forward(
        self, batches: Iterator[RankingBatch], compute: Callable[[MicroBatch], Output]
    ) -> Iterator[tuple[RankingBatch, Output]]:
        """Yield each batch with the output that ``compute`` returns for it in evaluation mode, without gradients."""
        self._check_last_loss()
        self._dense.module.eval()
        pipeline = self._pipeline(batches)
        current = pipeline.fetch()
        current.start()
        current.send()
        while current.totals().ranks:
            with torch.no_grad():
                embedded = current.rows()
                following = pipeline.fetch()
                following.start()
                following.send()
                (part,) = split_micro_batches(current.batch, embedded, self._fixed_lengths, 1)
                output = compute(part)
            self._clock.lap()
            try:
                yield current.batch, output
            except GeneratorExit:
                following.drain()
                raise
            current = following
        current.drain()

    def save(self, path: str | Path) -> None:
        """Write the whole model and its optimizers to a directory; each rank writes its shards. Collective.

        Raises:
            UserError: the directory cannot be written.
        """
        write_state(self.state(copy=False), path, self.control)

    def state(self, *, copy: bool) -> State:
        """Return the state that :meth:`save` writes, for ``trainer.checkpoint.model_state.write_state``. Collective.

        It holds no learning rates: they are a function of the number of rows trained on.

        Args:
            copy: copy the state into host memory, so that training can go on while it is written.

        Raises:
            NotFiniteLoss: the loss of the last step is not finite, which was not read before.
        """
        self._check_last_loss()
        return in_blocks(self._state(), self._snapshot if copy else None)

    def load(self, path: str | Path) -> None:
        """Load the model of :meth:`save`, also with another number of ranks, sharding plan or ZeRO stage. Collective.

        Raises:
            UserError: the directory holds no model, or a different one; the message lists the differences.
        """
        # A loss of the model that is replaced does not matter any more.
        self._unread = None
        self._finite.fill_(True)
        state = self._state()
        read_state(state, path, self.control)
        self._tables.loaded(state)
        self.steps_done = int(state["steps"])
        self._dense.load_state(state, self.steps_done)

    @property
    def dense_shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Shapes of the dense network's parameters and of its buffers, each by name."""
        module = self._dense.module
        return (
            {name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
            {name: tuple(buffer.shape) for name, buffer in module.named_buffers()},
        )

    def table_shards(self) -> Iterator[Shard]:
        """Yield this rank's shards of the tables; their values are live memory."""
        return self._tables.shards()

    def table_optimizer_shards(self) -> Iterator[tuple[str, Shard]]:
        """Yield the name and this rank's shard of each state of the tables' optimizer; live memory."""
        return self._tables.optimizer_shards()

    def id_counts(self) -> dict[str, IdCounts]:
        """Return dynamic table -> counts of its ids so far, over all ranks. Collective."""
        return self._tables.dynamic.counts()

    def set_dense_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set every parameter of the dense network, float32; its optimizer's state does not change. Collective."""
        self._dense.set_parameters(values)

    def allocate(self) -> int:
        """Allocate the dense optimizer's state now, not in the first step; return the bytes of its gradients."""
        return self._dense.allocate()

    def close(self) -> None:
        """Remove the references that libraries keep to the model, so that its memory can be freed."""
        self._dense.close()

    def _pipeline(self, batches: Iterator[RankingBatch]) -> BatchPipeline:
        """Return a pipeline over the batches; the time before it counts for no step."""
        self._clock.lap()
        return BatchPipeline(
            batches,
            self._tables,
            self._loss.labels,
            self._clock,
            self.control,
            content=self._content,
            complete=self.complete,
            stream=self.copy_stream,
        )

    def _state(self) -> dict[str, Any]:
        """Return the state of tables and dense network over live memory. Collective."""
        return {**self._tables.state(), **self._dense.state(), "steps": torch.tensor(self.steps_done)}

    def _train(
        self, current: InFlightBatch, embedded: Mapping[str, Tensor], following: InFlightBatch | None
    ) -> StepResult:
        """Train one step on a batch whose rows are ``embedded``, and send the ids of ``following`` meanwhile."""
        batch, totals = current.batch, current.totals()
        rows = totals.rows
        parts = split_micro_batches(batch, embedded, self._fixed_lengths, self._dense.parts, current.host)
        aligned, alignment_gradients = self._align(current, embedded, rows)
        # DeepSpeed divides the loss by the numbers of ranks and micro-batches; this makes it a mean over all rows.
        scale = self._world * len(parts) / max(rows, 1)
        logits, losses = [], torch.stack([torch.zeros_like(aligned), aligned])
        with self._clock.phase("dense"):
            loss_of = self._loss.begin(batch, parts, self._output)
            for number, (part, gradients) in enumerate(zip(parts, alignment_gradients, strict=True)):
                for name, leaf in part.embedded.items():
                    leaf.requires_grad_()
                    # The backward pass adds the network's gradient to the alignment's.
                    leaf.grad = gradients.get(name)
                logits.append(self._dense(*part.inputs, whole=part.has_all_sizes))
                loss = loss_of(number, logits[-1])
                losses[0] += loss.detach()
                last = part is parts[-1]
                if last:
                    summed = dist.all_reduce(losses, group=self._group, async_op=True)
                    # Before the last backward pass: the ids of the next batch are sent while it runs.
                    if following is not None:
                        following.send()
                self._dense.backward(loss * scale, last=last)
        with self._clock.phase("communication"):
            summed.wait()
        losses /= max(rows, 1)
        predicted = torch.cat([part.detach() for part in logits]).float()
        of_rows = {name: [part.gradient(name) for part in parts] for name in embedded}
        if self.reads_later:
            self._finite &= torch.isfinite(losses).all()
            with self._clock.phase("dense"):
                factor = self._dense.step(self._finite)
                # A product would keep NaN.
                of_rows = {name: [part.where(self._finite, 0) for part in of] for name, of in of_rows.items()}
                factor = torch.where(self._finite, factor, 0)
        else:
            if not torch.isfinite(losses).all():
                raise NotFiniteLoss(self.steps_done + 1, float(losses.sum()), batch, predicted)
            with self._clock.phase("dense"):
                factor = self._dense.step()
        current.update(of_rows, factor)
        self.steps_done += 1
        loss, alignment = losses.unbind()
        laps = self._clock.lap()
        counted = [] if batch.searched_missing is None else [batch.searched_missing]
        copies = HostCopy((losses, predicted, batch.user_id, batch.label, batch.mask, *counted))
        save, stop = totals.save > 0, totals.stop > 0
        return StepResult(
            self.steps_done, batch, predicted, loss, alignment, rows, totals.left_out, save, stop, laps, copies
        )

    def _check_last_loss(self) -> None:
        """Read the loss of the last step, if it was not read yet.

        Raises:
            NotFiniteLoss: it is not finite; the model is that before the step.
        """
        unread, self._unread = self._unread, None
        if unread is None or torch.isfinite(unread.values.losses).all():
            return
        # Neither this step nor a later one has changed the model.
        self.steps_done = unread.number - 1
        self._finite.fill_(True)
        raise NotFiniteLoss(unread.number, float(unread.values.losses.sum()), unread.batch, unread.logits)

    def _output(self, part: MicroBatch) -> Tensor:
        """Return the network's output for a micro-batch, for no backward pass."""
        return self._dense.module.forward(*part.inputs)

    def _align(
        self, current: InFlightBatch, embedded: Mapping[str, Tensor], rows: int
    ) -> tuple[Tensor, list[Mapping[str, Tensor]]]:
        """Return this rank's alignment loss and its gradients of the looked-up rows of each micro-batch. Collective."""
        batch = current.batch
        if self._alignment is None:
            return torch.zeros((), device=batch.dense.device), [{}] * self._dense.parts
        with self._clock.phase("dense"):
            lengths = row_lengths(batch, self._fixed_lengths)
            loss, gradients = self._alignment.gradients(embedded, lengths, batch.user_id, self._group, self.control)
            # The tables divide the summed gradients by the number of ranks; this makes it a mean over all rows.
            scaled = {name: gradient.mul_(self._world / max(rows, 1)) for name, gradient in gradients.items()}
            parts = split_micro_batches(batch, scaled, self._fixed_lengths, self._dense.parts, current.host)
        return loss, [part.embedded for part in parts]
