"""Copies between the host and the device that the host does not wait for.

Those to the host are read later, when the device has gone on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


class HostCopy:
    """Copies of some tensors in the memory of the host.

    The copies of a GPU's tensors go to page-locked memory, behind the work that is queued so far; the host queues more
    work meanwhile, and waits in :meth:`read` only. Tensors of the host are not copied.

    Args:
        tensors: tensors of one device, which do not change any more.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        host = torch.device("cpu")
        sources = [tensor.detach() for tensor in tensors]
        self._copies = [source.to(host, non_blocking=True) for source in sources]
        self._copied: torch.cuda.Event | None = None
        if any(source.device.type == "cuda" for source in sources):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[Tensor]:
        """Return the copies, in order; the first call waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._copies

    def numbers(self) -> list[float]:
        """Return the elements of all copies as numbers; the first call waits for the device."""
        return [number for copy in self.read() for number in copy.flatten().tolist()]


def one_behind(copies: Iterable[tuple[Key, HostCopy]]) -> Iterator[tuple[Key, list[Tensor]]]:
    """Yield keys with the tensors of their copies, each when the next copy has been queued.

    So a device computes the next tensors while the host reads and uses these.

    Args:
        copies: a lazy iterable, which queues the work for a copy when it is asked for it.
    """
    waiting: tuple[Key, HostCopy] | None = None
    for following in copies:
        if waiting is not None:
            yield waiting[0], waiting[1].read()
        waiting = following
    if waiting is not None:
        yield waiting[0], waiting[1].read()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, behind the work that is queued so far; the host waits for nothing.

    A tensor that is on the device already is returned itself.
    """
    if tensor.device.type == device.type:
        return tensor
    # A copy from pageable memory would wait for all that is queued.
    return tensor.pin_memory().to(device, non_blocking=True)
