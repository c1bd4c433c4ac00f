"""The batches of all ranks in step: fetched, announced to the other ranks, and their ids on the way before they count.

The exchange of ids needs no table, so that of the next batch can go on while the dense network works on this one. Rows
are looked up only after the tables have learnt from this batch: overlapping changes no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data.features.packed_batch import BatchLayout
from trainer.data.loading.batch import RankingBatch, empty_batch
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.exchange import Gradients, on_stream
from trainer.sparse.sharded_tables import ShardedTables


class StepRequest(NamedTuple):
    """What a rank would have all ranks do together after a step."""

    save: bool = False
    stop: bool = False


NOTHING = StepRequest()


class Count(NamedTuple):
    """Rows of a step on all ranks, and the number of ranks that still had a batch, or that asked for something."""

    rows: int
    ranks: int
    save: int
    stop: int


class InFlightBatch:
    """A batch whose ids are on their way to the ranks that hold their rows.

    Args:
        batch: on its device, or on its way there.
        tables: that its ids are rows of.
        stream: on which it travels; None without a GPU.
        clock: of the steps.
        control: a gloo group of all ranks.
        out: this rank has no more batches; this one is empty.
        ask: what this rank would have done after the step; it travels with the count of rows.

    Attributes:
        batch: as given.
    """

    def __init__(
        self,
        batch: RankingBatch,
        tables: ShardedTables,
        stream: torch.cuda.Stream | None,
        clock: PhaseClock,
        control: dist.ProcessGroup,
        *,
        out: bool,
        ask: StepRequest,
    ) -> None:
        self.batch = batch
        self._stream, self._clock = stream, clock
        self._count = torch.tensor([batch.rows, not out, *ask], dtype=torch.int64)
        self._work: dist.Work | None = None
        if dist.get_world_size(control) > 1:
            self._work = dist.all_reduce(self._count, group=control, async_op=True)
        with on_stream(stream):
            self._exchanges = tables.start(batch.ids)

    def send(self) -> None:
        """Send the ids off, once it is known how many come from where."""
        with self._clock.phase("tables"), on_stream(self._stream):
            for exchange in self._exchanges:
                exchange.send()

    def count(self) -> Count:
        """What all ranks have of this step."""
        if self._work is not None:
            with self._clock.phase("communication"):
                self._work.wait()
            self._work = None
        return Count(*self._count.tolist())

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Lookup name -> ``[ids, dim]`` float32, as the tables are now; outside of autograd.

        ``step`` is the number of the training step that this is for; see :meth:`trainer.sparse.exchange.Exchange.rows`.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self.batch.record_stream(torch.cuda.current_stream())
        with self._clock.phase("tables"):
            return {name: rows for exchange in self._exchanges for name, rows in exchange.rows(step).items()}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Train the tables; see :meth:`trainer.sparse.exchange.Exchange.update`."""
        with self._clock.phase("tables"):
            for exchange in self._exchanges:
                exchange.update(gradients, scale)

    def drain(self) -> None:
        """Let what is on its way arrive, and forget it."""
        self.count()
        for exchange in self._exchanges:
            exchange.drain()


class BatchPipeline:
    """Fetches batches and starts their exchange; all ranks fetch equally often, with empty batches when out of others.

    Args:
        batches: of this rank.
        tables: that their ids are rows of.
        behaviours: columns of the labels.
        clock: of the steps.
        control: a gloo group of all ranks.
    """

    def __init__(
        self,
        batches: Iterator[RankingBatch],
        tables: ShardedTables,
        behaviours: int,
        clock: PhaseClock,
        control: dist.ProcessGroup,
    ) -> None:
        self._batches, self._tables, self._clock, self._control = batches, tables, clock, control
        self._stream = torch.cuda.Stream(clock.device) if clock.device.type == "cuda" else None
        with clock.phase("data"):
            self._first = next(batches, None)
        # A rank without any batch learns from the others how wide the dense features are.
        n_dense = torch.tensor(0 if self._first is None else self._first.dense.shape[1])
        dist.all_reduce(n_dense, dist.ReduceOp.MAX, group=control)
        keys = tuple(tuple(names) for names in tables.keys)
        self._empty = empty_batch(BatchLayout(keys, int(n_dense), behaviours))

    def fetch(self, ask: StepRequest = NOTHING) -> InFlightBatch:
        """The next batch of this rank, on its way; ``ask`` is for after its step."""
        with self._clock.phase("data"):
            batch = self._first if self._first is not None else next(self._batches, None)
        self._first = None
        out = batch is None
        batch = self._empty if batch is None else batch
        # Where this rank stands does not change any more when it has run out.
        self._empty = replace(self._empty, position=batch.position)
        with self._clock.phase("tables"):
            if self._stream is not None:
                with on_stream(self._stream):
                    batch = batch.to(self._clock.device, non_blocking=True)
            return InFlightBatch(batch, self._tables, self._stream, self._clock, self._control, out=out, ask=ask)
