"""Cost of a network's training step, counted on the meta device: nothing is computed, and no memory is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class NetworkCost(NamedTuple):
    """Cost of forward and backward pass on one rank.

    Attributes:
        flops: floating-point operations of matrix products; a multiplication and an addition are two.
        operations: operations that PyTorch starts, each at least one kernel on a GPU.
        traffic_bytes: bytes of all operands and results; views count nothing.
        peak_bytes: largest sum of bytes of the tensors that the two passes make and still need, the gradients of inputs
            and weights included.
    """

    flops: float
    operations: float
    traffic_bytes: float
    peak_bytes: float

    def times(self, passes: int) -> NetworkCost:
        """Return the cost of several passes, one after the other; the peak is that of one."""
        return NetworkCost(passes * self.flops, passes * self.operations, passes * self.traffic_bytes, self.peak_bytes)


class _Counter(TorchDispatchMode):
    """Counts operations, the bytes of their operands, and the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.traffic, self.live, self.peak = 0, 0, 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Leave out the storages of tensors that exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view has no work of its own.
        if not func.is_view:
            self.operations += 1
            self.traffic += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new until it is freed."""
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata, storage.nbytes()))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        """Return the function that is called when a storage is freed."""

        def freed(reference: Any) -> None:
            # The address may belong to another storage by now.
            if self._known.get(key) is reference:
                del self._known[key]
            self.live -= size

        return freed


def count_step(network: nn.Module, inputs: tuple[Any, ...]) -> NetworkCost:
    """Return the cost of a forward and a backward pass from the sum of the outputs.

    Args:
        network: the network, on the meta device or on a CPU.
        inputs: its arguments, on the same device; tensors in mappings are found.
    """
    existing = [*network.parameters(), *network.buffers(), *_tensors(inputs)]
    with FlopCounterMode(display=False) as flops, _Counter() as counter:
        counter.ignore(iter(existing))
        output = network(*inputs)
        output.sum().backward()
        del output
    cost = NetworkCost(flops.get_total_flops(), counter.operations, counter.traffic, counter.peak)
    network.zero_grad(set_to_none=True)
    return cost


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments, those in mappings and objects with ``tensors`` included."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from (tensor for value in values.values() for tensor in _tensors(value))
    elif hasattr(values, "tensors"):
        yield from values.tensors()
    elif isinstance(values, tuple):
        yield from (tensor for value in values for tensor in _tensors(value))
