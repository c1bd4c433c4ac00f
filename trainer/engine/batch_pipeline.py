"""Prefetches batches and starts the exchange of their ids early, in step on all ranks.

The exchange of ids needs no table, so the ids of the next batch can be sent while the dense network works on this one.
Rows are looked up only after the tables have been trained on this batch: overlapping changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data.features.packed_batch import BatchLayout, ContentLayout
from trainer.data.loading.batch import RankingBatch, empty_batch
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.exchange import Exchange, Gradients, on_stream
from trainer.sparse.sharded_tables import ShardedTables


class StepRequest(NamedTuple):
    """Request of one rank for what all ranks do together after a step.

    Attributes:
        save: write a checkpoint.
        stop: end the training.
    """

    save: bool = False
    stop: bool = False


NO_REQUEST = StepRequest()


class StepTotals(NamedTuple):
    """Sums over all ranks for one step.

    Attributes:
        rows: rows of all batches.
        left_out: rows that were read for these batches, and are not in them.
        ranks: ranks that still had a batch.
        save: ranks that requested a checkpoint.
        stop: ranks that requested to stop.
    """

    rows: int
    left_out: int
    ranks: int
    save: int
    stop: int


class InFlightBatch:
    """Batch whose ids are sent to the ranks that hold their rows.

    The constructor starts no network traffic. The methods are collective: every rank calls :meth:`start`,
    :meth:`send`, :meth:`rows` and :meth:`update` in this order, or :meth:`drain` after :meth:`send`.

    Args:
        batch: the batch, on its device or being copied there on ``stream``.
        exchanges: exchanges of its ids, in the same order on all ranks.
        stream: CUDA stream that the batch is copied on; None without a GPU.
        clock: counts the phases of a step.
        control: a gloo group of all ranks.
        exhausted: True if this rank has no more batches; ``batch`` is then empty.
        request: request of this rank; it is summed over the ranks together with the number of rows.
        host: the batch on the host; None if ``batch`` is there.

    Attributes:
        batch: the batch as given; after :meth:`rows` with all vectors that a device has found.
        host: the same batch on the host.
    """

    def __init__(
        self,
        batch: RankingBatch,
        exchanges: Sequence[Exchange],
        stream: torch.cuda.Stream | None,
        clock: PhaseClock,
        control: dist.ProcessGroup,
        *,
        exhausted: bool,
        request: StepRequest,
        host: RankingBatch | None = None,
    ) -> None:
        self.batch = batch
        self.host = batch if host is None else host
        self._exchanges = exchanges
        self._stream, self._clock, self._control = stream, clock, control
        self._totals = torch.tensor([batch.rows, batch.left_out_rows, not exhausted, *request], dtype=torch.int64)
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Start to sum the totals of the step over the ranks, and start the exchanges of the ids.

        Raises:
            UserError: an id is outside its table; some exchanges find it in :meth:`send`.
        """
        with self._clock.phase("tables"):
            if dist.get_world_size(self._control) > 1:
                self._work = dist.all_reduce(self._totals, group=self._control, async_op=True)
            with on_stream(self._stream):
                for exchange in self._exchanges:
                    exchange.start()

    def send(self) -> None:
        """Start to send the ids, as soon as the number of ids from every rank is known.

        Raises:
            UserError: an id is outside its table; see :meth:`start`.
        """
        with self._clock.phase("tables"), on_stream(self._stream):
            for exchange in self._exchanges:
                exchange.send()

    def totals(self) -> StepTotals:
        """Return the sums of this step over all ranks."""
        if self._work is not None:
            with self._clock.phase("communication"):
                self._work.wait()
            self._work = None
        return StepTotals(*self._totals.tolist())

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Return lookup name -> ``[ids, dim]`` float32 rows of the tables as they are now, outside of autograd.

        ``step`` is the number of the training step; see :meth:`trainer.sparse.exchange.Exchange.rows`.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self.batch.record_stream(torch.cuda.current_stream())
        self.batch = self.batch.finished()
        with self._clock.phase("tables"):
            return {name: rows for exchange in self._exchanges for name, rows in exchange.rows(step).items()}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Train the tables; see :meth:`trainer.sparse.exchange.Exchange.update`."""
        with self._clock.phase("tables"):
            for exchange in self._exchanges:
                exchange.update(gradients, scale)

    def drain(self) -> None:
        """Wait for the transfers in progress and discard their data."""
        self.totals()
        for exchange in self._exchanges:
            exchange.drain()


class BatchPipeline:
    """Fetches batches and prepares their exchange.

    All ranks fetch equally often; a rank that has no more batches gets empty ones. The constructor is collective.

    Args:
        batches: batches of this rank.
        tables: tables that their ids refer to.
        behaviours: number of columns of the labels.
        clock: counts the phases of a step.
        control: a gloo group of all ranks.
        content: tables of pre-trained vectors.
        complete: makes the searches that batches leave to the device.
        stream: CUDA stream to copy batches on; None without a GPU. All pipelines of a device share one, so that what
            ``complete`` keeps on the device is written and read in order, and memory that it frees serves it again.
    """

    def __init__(
        self,
        batches: Iterator[RankingBatch],
        tables: ShardedTables,
        behaviours: int,
        clock: PhaseClock,
        control: dist.ProcessGroup,
        *,
        content: tuple[ContentLayout, ...] = (),
        complete: Callable[[RankingBatch], RankingBatch] | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._complete, self._stream = complete, stream
        self._batches, self._tables, self._clock, self._control = batches, tables, clock, control
        with clock.phase("data"):
            self._first = next(batches, None)
        # A rank without any batch learns from the others how wide the dense features are.
        n_dense = torch.tensor(0 if self._first is None else self._first.dense.shape[1])
        dist.all_reduce(n_dense, dist.ReduceOp.MAX, group=control)
        keys = tuple(tuple(names) for names in tables.keys)
        self._empty = empty_batch(BatchLayout(keys, int(n_dense), behaviours, content=content))

    def fetch(self, request: StepRequest = NO_REQUEST) -> InFlightBatch:
        """Return the next batch of this rank, not yet started; ``request`` is for the end of its step."""
        with self._clock.phase("data"):
            batch = self._first if self._first is not None else next(self._batches, None)
        self._first = None
        exhausted = batch is None
        batch = self._empty if batch is None else batch
        # An exhausted rank goes on to report the position of its last batch, which a checkpoint stores.
        self._empty = replace(self._empty, position=batch.position)
        with self._clock.phase("tables"):
            host = batch
            with on_stream(self._stream):
                if self._stream is not None:
                    batch = batch.to(self._clock.device, non_blocking=True)
                if batch.left is not None:
                    assert self._complete is not None, "a search is left to the device, and nothing makes it"
                    batch = self._complete(batch)
            return InFlightBatch(
                batch,
                self._tables.exchanges(batch.ids),
                self._stream,
                self._clock,
                self._control,
                exhausted=exhausted,
                request=request,
                host=host,
            )
