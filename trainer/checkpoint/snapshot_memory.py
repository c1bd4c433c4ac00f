"""Host memory of snapshots: copies of a model's state, which a thread writes to disk while training continues.

The memory of a snapshot is used again for the next one. A new one would be mapped page by page while training waits,
and page-locked memory, to which a GPU copies several times as fast, takes even longer to allocate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]


def host_like(tensor: Tensor) -> Tensor:
    """Return uninitialised host memory for a copy of a tensor: page-locked if the tensor is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)


class SnapshotMemory:
    """Memory of the latest snapshot, which the next one uses after :meth:`begin`.

    Args:
        allocate: returns host memory for a copy of a tensor.
    """

    def __init__(self, allocate: Callable[[Tensor], Tensor] = host_like) -> None:
        self._allocate = allocate
        self._free: dict[_Kind, list[Tensor]] = {}
        self._used: dict[_Kind, list[Tensor]] = {}
        self._devices: set[torch.device] = set()

    def begin(self) -> None:
        """Begin a snapshot. The copies of the one before become invalid, so it must have been written."""
        # Memory that the snapshot before did not need is released here.
        self._free, self._used = self._used, {}

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, valid after :meth:`wait`; a GPU copies while the host continues."""
        source = tensor.detach()
        kind = (source.dtype, source.shape, source.stride(), source.is_cuda)
        free = self._free.get(kind)
        target = free.pop() if free else self._allocate(source)
        self._used.setdefault(kind, []).append(target)
        if source.is_cuda:
            self._devices.add(source.device)
        return target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Wait for the copies of GPUs. What is queued on a GPU later does not change them."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._devices.clear()
        self._free = {}
