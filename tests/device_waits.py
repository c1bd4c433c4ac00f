"""Counts the calls for which the host would wait for a GPU; on a CPU, the same code makes the same calls.

Two modes see them. PyTorch's dispatcher sees the operations whose result the host needs, also if a compiled function
calls them: a number that is read, a shape that depends on values. ``tolist``, ``numpy`` and copies are seen as calls
from Python only: of Python scalars and lists to the device, and of tensors to the host. The first reading of a
``HostCopy`` waits, too. Without a GPU all tensors are on one device, so code that only works with tensors of the host
is listed in ``HOST_ONLY``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.paths import ROOT
from trainer.runtime.host_copy import HostCopy

HOST_ONLY = {
    # Files and functions; a GPU runs TorchRec's exchange on its copy stream instead of the first ones.
    ("trainer/sparse/", ""),
    ("trainer/data/", ""),
    ("trainer/metrics/", ""),
    ("trainer/checkpoint/", ""),
    ("trainer/runtime/distributed.py", ""),
    # Values of a copy.
    *(("trainer/runtime/host_copy.py", name) for name in ("__init__", "read", "numbers", "to_device")),
    ("trainer/runtime/scalars.py", ""),
    # Sums over the ranks, of numbers in the memory of the host.
    ("trainer/engine/batch_pipeline.py", "totals"),
    ("trainer/engine/step_loop.py", "_summed"),
    # Lengths of the batch on the host.
    ("trainer/engine/micro_batches.py", "split_micro_batches"),
    # A GPU takes all rows as one block and reads no lengths.
    ("modules/blocks.py", "cut_rows"),
    # Values that HostCopy has copied.
    ("trainer/engine/hybrid_engine.py", "loss"),
    ("trainer/engine/hybrid_engine.py", "alignment"),
    ("trainer/engine/hybrid_engine.py", "_check_last_loss"),
}
OWN_DEVICE = {
    # Functions that move tensors to the device where they are, which has the host's name here.
    ("torch/optim/adam.py", "_fused_adam"),
    ("trainer/engine/step_loss.py", "begin"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "get_grad_norm_direct"),
    ("transformers/models/qwen2/modeling_qwen2.py", "forward"),
}
_DISPATCHED = (
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
)
_READS = ("tolist", "numpy", "__array__", "cpu", "__contains__")
_COPIES = ("tensor", "as_tensor")


class Waits:
    """Context that records each call for which the host would wait, as ``operation in file:function``.

    Attributes:
        calls: calls so far.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._modes = ExitStack()
        self._copies: list[HostCopy] = []

    def __enter__(self) -> Waits:
        patch, read = self._modes.enter_context(pytest.MonkeyPatch.context()), HostCopy.read

        def counted_read(copy: HostCopy) -> list[Tensor]:
            if not any(other is copy for other in self._copies):
                self._copies.append(copy)
                self.calls.append("values of a step")
            return read(copy)

        patch.setattr(HostCopy, "read", counted_read)
        self._modes.enter_context(_FunctionWaits(self))
        self._modes.enter_context(_DispatchWaits(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def add(self, operation: str) -> None:
        """Record a call, unless code that only works with tensors of the host makes it."""
        place, frame = "", sys._getframe(2)
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            for part, name in HOST_ONLY:
                if part in file and name in ("", function):
                    return
            own = file.startswith(str(ROOT)) and "/tests/" not in file and "/site-packages/" not in file
            if not place and (own or "/deepspeed/" in file):
                place = f"{Path(file).name}:{function}"
            frame = frame.f_back  # type: ignore[assignment]
        self.calls.append(f"{operation} in {place}")


class _FunctionWaits(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS and args and isinstance(args[0], Tensor):
            self._waits.add(name)
        elif name == "to" and not kwargs.get("non_blocking") and _names_the_host(args[1:], kwargs):
            code = sys._getframe(1).f_code
            if not any(code.co_filename.endswith(file) and code.co_name == at for file, at in OWN_DEVICE):
                self._waits.add("to the host")
        elif _copies_a_value(name, args, kwargs):
            self._waits.add("a value to the device")
        elif name in ("__getitem__", "__setitem__") and _holds_list(args[1]):
            self._waits.add("a list as an index")
        return func(*args, **kwargs)


class _DispatchWaits(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _DISPATCHED or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self._waits.add(name)
        elif name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1:
            # A mask becomes the numbers of its places, whose number the host needs.
            masks = args[1] if isinstance(args[1], list | tuple) else []
            if any(isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
                self._waits.add("a mask as an index")
        return func(*args, **kwargs)


def _copies_a_value(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if a Python value becomes a tensor of the device."""
    if name == "new_tensor":
        return not isinstance(args[1], Tensor)
    return name in _COPIES and kwargs.get("device") is not None and not isinstance(args[0], Tensor)


def _names_the_host(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    devices = [value for value in (*args, kwargs.get("device")) if isinstance(value, str | torch.device)]
    return any(torch.device(device) == torch.device("cpu") for device in devices)


def _holds_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))
