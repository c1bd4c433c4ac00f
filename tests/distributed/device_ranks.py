"""Ranks of test_device_groups.py: a job on a stand-in for a GPU, which keeps its tensors apart from those of the host.

    torchrun --nproc-per-node 2 -m tests.distributed.device_ranks trainer.rank configs/simulated.toml ...

The device is ``cpu:0`` and the host ``cpu``. Both are the same memory, so the job computes as on a CPU; but a tensor
that comes from the device carries a mark, and so does all that is computed from it. The default process group has a
backend of its own name, as NCCL's has, so that the control group is another one. Every collective that the project's
own code calls must then name a group: the default group for marked tensors, another one for tensors of the host.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.paths import ROOT
from trainer.engine import batch_pipeline
from trainer.runtime import distributed

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
BACKEND = "standin"
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)
OWN_CODE = tuple(str(ROOT / package) for package in ("trainer", "modules", "launch"))
CPU_ONLY = ("trainer/sparse/flat_exchange.py", "trainer/sparse/dynamic_exchange.py")
"""Code that only a CPU runs, on the default group, with tensors of the host."""


class WrongGroup(Exception):
    """A collective names no group, or one that does not take tensors of this device."""


def marked(value: object) -> bool:
    """True if a tensor is on the stand-in for a GPU."""
    return isinstance(value, Tensor) and getattr(value, "on_standin", False)


def mark(value: Any, *, device: bool = True) -> Any:
    """Mark the tensors in a value as those of the device, or of the host."""
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            tensor.on_standin = device  # type: ignore[attr-defined]
    return value


class Marks(TorchFunctionMode):
    """Passes the mark on from the arguments of a function to its results."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = tree_leaves((args, kwargs))
        inputs = [value for value in arguments if isinstance(value, Tensor)]
        result = func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return DEVICE if marked(args[0]) else result
        if func == Tensor.data.__set__:
            mark(args[0], device=marked(args[1]))
            return result
        devices = [value for value in arguments if isinstance(value, torch.device)]
        if getattr(func, "__name__", "") == "cpu":
            devices.append(HOST)
        on_device = devices[-1] == DEVICE if devices else any(map(marked, inputs))
        known = set(map(id, inputs))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (devices or id(tensor) not in known):
                if id(tensor) in known and marked(tensor) != on_device:
                    # A copy to another device is another tensor; here it would change the mark of its source.
                    return mark(tensor.view_as(tensor), device=on_device)
                mark(tensor, device=on_device)
        return result


def checked(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a collective that refuses calls of the project's own code whose group does not fit their tensors."""

    def collective(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(OWN_CODE) and not caller.endswith(CPU_ONLY):
            group = kwargs.get("group")
            if group is None:
                raise WrongGroup(f"{caller}: {name} names no group")
            kind = "device" if dist.get_backend(group) == BACKEND else "host"
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and marked(tensor) != (kind == "device"):
                    raise WrongGroup(f"{caller}: {name} on the {kind}'s group, with a tensor that is not on the {kind}")
            calls.append(f"{name} on the {kind}")
        return plain(*args, **kwargs)

    return collective


calls: list[str] = []
"""Collectives of the project's own code so far."""


def gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Return the group behind the stand-in's backend."""
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def start_standin() -> None:
    """Replace the device, the backend of the default group, and the copies to the device, in this process."""
    dist.Backend.register_backend(BACKEND, gloo, devices=["cpu"])
    plain_init = dist.init_process_group
    dist.init_process_group = lambda backend, **options: plain_init(BACKEND, **options)
    distributed.choose_device = lambda device, local_rank: DEVICE
    for name in COLLECTIVES:
        setattr(dist, name, checked(name, getattr(dist, name)))

    class InFlightBatch(batch_pipeline.InFlightBatch):
        """Batch that is copied to the device, with looked-up rows that come from there."""

        def __init__(self, batch: Any, *args: Any, **kwargs: Any) -> None:
            mark([batch.dense, batch.label, batch.mask, batch.user_id, batch.slow])
            super().__init__(batch, *args, **kwargs)

        def rows(self, step: int | None = None) -> dict[str, Tensor]:
            return mark(super().rows(step))

    batch_pipeline.InFlightBatch = InFlightBatch  # type: ignore[misc]
    Marks().__enter__()


def report() -> str:
    """Return a line for each kind of collective that the project's own code has called, with the number of calls."""
    return "".join(f"{call}: {calls.count(call)}\n" for call in sorted(set(calls)))


if __name__ == "__main__":
    _, job, *arguments = sys.argv
    start_standin()
    sys.argv = [job, *arguments]
    try:
        runpy.run_module(job, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    print("collectives:\n" + report(), end="", flush=True)
