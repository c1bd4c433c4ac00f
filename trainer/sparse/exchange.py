"""Exchange of ids, rows and gradients with the ranks that hold the rows.

One exchange serves one collection in one step. Its stages are explicit, so that a pipeline can run other work between
them. :class:`TorchRecExchange` is TorchRec's own path and the reference for correct results.
:class:`trainer.sparse.flat_exchange.FlatExchange` does the same with fewer copies and collectives: on a CPU for all
tables, on a GPU next to dynamic tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse.range_check import RangeCheck

Gradients = Mapping[str, Sequence[Tensor]]
"""Lookup name -> gradients of consecutive micro-batches, in order."""


class Exchange(Protocol):
    """Exchange of one collection in one step.

    The constructor starts no network traffic. The stages are collective: every rank calls them in this order.
    """

    def start(self) -> None:
        """Start to tell every rank the number of ids that this rank will send to it; returns without waiting."""

    def send(self) -> None:
        """Wait for the numbers of ids from all ranks and start to send the ids."""

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Return lookup name -> ``[ids, dim]`` float32 rows in the order of the ids, outside of autograd.

        ``step`` is the number of the training step, in which dynamic tables admit ids; None if nothing is trained.
        """

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Train the tables on ``scale`` times the gradients, summed over all ranks and divided by their number.

        With gradients of zeros no optimizer of :class:`trainer.sparse.planner.TableOptimizer` changes anything.
        """

    def drain(self) -> None:
        """Wait for the transfers in progress and discard their data; called instead of ``rows``."""


class TorchRecExchange:
    """TorchRec's input distribution, lookup and output distribution, for any device and any sharding.

    Args:
        collection: the collection, sharded by TorchRec.
        ids: ids of this rank; their keys are the collection's lookups.
        clock: counts the time of waiting for other ranks as communication.
    """

    def __init__(self, collection: ShardedEmbeddingCollection, ids: KeyedJaggedTensor, clock: PhaseClock) -> None:
        self._collection, self._ids, self._clock = collection, ids, clock
        self._context = collection.create_context()
        self._rows: dict[str, Tensor] = {}
        self._tables = {key: table for table in collection._embedding_configs for key in table.feature_names}

    def start(self) -> None:
        """Start TorchRec's input distribution; see :meth:`Exchange.start`."""
        self._stream = torch.cuda.current_stream() if self._clock.device.type == "cuda" else None
        keys: list[str] = self._ids.keys()
        tables = [self._tables[key] for key in keys]
        self._check = RangeCheck(self._ids.values(), self._ids.length_per_key(), tables)
        self._incoming = self._collection.input_dist(self._context, _at_least_one_row(self._ids))

    def send(self) -> None:
        """Start to send the ids; see :meth:`Exchange.send`.

        Raises:
            UserError: an id is outside its table.
        """
        self._check.raise_if_outside()
        with self._clock.phase("communication"):
            # The first wait of TorchRec's awaitable gives the sizes; the second one, in ``rows``, gives the ids.
            self._incoming = self._incoming.wait()

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Look up the received ids and return the rows of this rank's ids; see :meth:`Exchange.rows`."""
        with self._clock.phase("communication"), on_stream(self._stream):
            received = self._incoming.wait()
        if self._stream is not None:
            pass_to_current_stream(self._stream, (received, self._context))
        returning = self._collection.compute_and_output_dist(self._context, received)
        with self._clock.phase("communication"):
            self._rows = {name: jagged.values() for name, jagged in returning.wait().items()}
        return {name: values.detach() for name, values in self._rows.items()}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Train the tables; see :meth:`Exchange.update`. TorchRec divides by the number of ranks in its backward."""
        trained = {name: values for name, values in self._rows.items() if values.requires_grad}
        row_gradients = [_scaled(gradients[name], scale) for name in trained]
        torch.autograd.backward(list(trained.values()), row_gradients)
        self._rows = {}

    def drain(self) -> None:
        """Receive the ids and discard them; see :meth:`Exchange.drain`."""
        with on_stream(self._stream):
            self._incoming.wait()


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Return a context that queues GPU work on ``stream``; with None (no GPU) it does nothing."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def pass_to_current_stream(source: torch.cuda.Stream, tensors: Iterable[Any]) -> None:
    """Let the current stream read tensors that were made on another one.

    Their memory was allocated on the other stream. It may not be reused before the current one has finished with it.
    """
    current = torch.cuda.current_stream()
    current.wait_stream(source)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.is_cuda:
            tensor.record_stream(current)


def _at_least_one_row(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the ids, with one row that has no ids if the batch is empty: TorchRec divides by the number of rows."""
    if ids.stride():
        return ids
    keys = ids.keys()
    lengths = torch.zeros(len(keys), dtype=ids.lengths().dtype, device=ids.device())
    return KeyedJaggedTensor(keys=keys, values=ids.values(), lengths=lengths, stride=1, length_per_key=[0] * len(keys))


def _scaled(parts: Sequence[Tensor], scale: float | Tensor) -> Tensor:
    """Return ``scale`` times the joined parts, in memory of its own."""
    return parts[0] * scale if len(parts) == 1 else torch.cat(list(parts)).mul_(scale)
