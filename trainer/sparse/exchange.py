"""How ids reach the ranks that hold their rows, how rows come back, and gradients go the same way again.

An exchange serves one collection in one step. Its stages are explicit, so that a pipeline can put other work between
them. :class:`TorchRecExchange` is TorchRec's own path and the definition of what is right.
:class:`trainer.sparse.cpu_exchange.CpuExchange` does the same on a CPU with fewer copies and collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.runtime.phase_timer import PhaseClock

Gradients = Mapping[str, Sequence[Tensor]]
"""Lookup name -> gradients of consecutive parts of its rows, in order."""


class Exchange(Protocol):
    """One collection's part in one step. The stages are collective and come in this order."""

    def send(self) -> None:
        """Learn how many ids come from where, and send the ids off."""

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Lookup name -> ``[ids, dim]`` float32 rows in the order of the ids, outside of autograd.

        ``step`` is the number of the training step that this is for, in which dynamic tables admit ids.
        """

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Train the tables on ``scale`` times the sum of the gradients of all ranks, divided by their number."""

    def drain(self) -> None:
        """Instead of ``rows``: let what is on its way arrive, and forget it."""


class TorchRecExchange:
    """TorchRec's input distribution, lookup and output distribution; any device, any sharding.

    Args:
        collection: as TorchRec sharded it.
        ids: of this rank; their keys are the collection's lookups.
        clock: waiting for other ranks is counted as communication.
    """

    def __init__(self, collection: ShardedEmbeddingCollection, ids: KeyedJaggedTensor, clock: PhaseClock) -> None:
        self._collection, self._clock = collection, clock
        self._stream = torch.cuda.current_stream() if clock.device.type == "cuda" else None
        self._context = collection.create_context()
        self._arriving = collection.input_dist(self._context, _at_least_one_row(ids))
        self._found: dict[str, Tensor] = {}

    def send(self) -> None:
        """See :class:`Exchange`."""
        with self._clock.phase("communication"):
            self._arriving = self._arriving.wait()

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """See :class:`Exchange`."""
        with self._clock.phase("communication"), on_stream(self._stream):
            received = self._arriving.wait()
        if self._stream is not None:
            # What came in on another stream must outlive what this one does with it.
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            received.record_stream(current)
            self._context.record_stream(current)
        returning = self._collection.compute_and_output_dist(self._context, received)
        with self._clock.phase("communication"):
            self._found = {name: jagged.values() for name, jagged in returning.wait().items()}
        return {name: values.detach() for name, values in self._found.items()}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """See :class:`Exchange`; it is TorchRec that divides by the number of ranks, on the way back."""
        trained = {name: values for name, values in self._found.items() if values.requires_grad}
        given = [torch.cat(list(gradients[name])) * scale for name in trained]
        torch.autograd.backward(list(trained.values()), given)
        self._found = {}

    def drain(self) -> None:
        """See :class:`Exchange`."""
        with on_stream(self._stream):
            self._arriving.wait()


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Queue what is inside on a stream; None, without a GPU, changes nothing."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _at_least_one_row(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The ids, where there are no rows those of one without ids: TorchRec divides by the rows when they return."""
    if ids.stride():
        return ids
    keys = ids.keys()
    lengths = torch.zeros(len(keys), dtype=ids.lengths().dtype, device=ids.device())
    return KeyedJaggedTensor(keys=keys, values=ids.values(), lengths=lengths, stride=1, length_per_key=[0] * len(keys))
