"""Copies from the device to the host that are read later, when the device has long gone on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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
