"""Who this process is among the ranks of a job. The one place that decides device, backend and timeouts."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from trainer.console.errors import UserError, is_lost_peer
from trainer.console.exit_status import exit_status
from trainer.runtime.malloc import keep_freed_memory
from trainer.runtime.network_interfaces import interface_towards, loopback_interface
from trainer.runtime.rendezvous import fresh_part, shared_store

logger = logging.getLogger(__name__)

DeviceChoice = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")

TIMEOUT_SECONDS = 1800
"""A collective that waits longer than this for another rank fails: long enough for a rank that fits features alone."""

LOST_PEER_SECONDS = 1.5
"""A rank that failed since another has gone waits so long before it ends: launchers take the first that ends for the
cause, and torchrun tells moments apart by whole seconds."""


@dataclass
class World:
    """The ranks of a job, as one of them sees it. A context manager that leaves the process group at its end.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        device: that this rank computes on.
        control: a gloo group of all ranks, for small messages between hosts that must not wait for a GPU.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup = field(repr=False)

    @staticmethod
    def join(device: DeviceChoice = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> World:
        """Join the ranks that torchrun, deepspeed or ``limelight train`` started; alone where none did.

        Raises:
            UserError: CUDA is asked for but not there, more ranks than GPUs, or the ranks cannot meet.
        """
        rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
        local_rank = _from_environment("LOCAL_RANK", rank)
        chosen = choose_device(device, local_rank)
        _quiet_libraries()
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        else:
            keep_freed_memory()
        # DeepSpeed reads the first once, when it is imported, and would else take any GPU; it insists on the second.
        os.environ["DS_ACCELERATOR"] = chosen.type
        os.environ["LOCAL_RANK"] = str(local_rank)
        several_machines = size != local_size()
        # By itself gloo takes the address of this host's name: a name service, or for other machines the loopback.
        master = os.environ.get("MASTER_ADDR", "localhost")
        interface = interface_towards(master) if several_machines else loopback_interface()
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        try:
            store = shared_store(timeout)
            if store is None and "MASTER_PORT" in os.environ and "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                # No launcher, one rank: a store in memory needs no port.
                part = dist.HashStore() if store is None else fresh_part(store, rank, size, timeout)
                dist.init_process_group(backend, store=part, rank=rank, world_size=size, timeout=timeout)
            control = control_group()
        except (RuntimeError, ValueError) as error:
            place = f"{master}:{os.environ.get('MASTER_PORT', '-')}"
            reason = str(error).strip().splitlines()[0]
            advice = "the address must be the first machine's and the port free there"
            if several_machines:
                network = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
                advice += f", and GLOO_SOCKET_IFNAME (here {network}) name the network between the machines"
            raise UserError(
                f"rank {rank} of {size} could not meet the others at MASTER_ADDR:MASTER_PORT = {place} ({reason}); "
                + advice
            ) from None
        return World(rank, size, chosen, control)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # A rank that leaves early tears down connections that slower ranks are still reading from.
            self.barrier()
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is not None and deepspeed.comm.is_initialized():
            # It keeps groups of its own, which a later process group would find.
            deepspeed.comm.destroy_process_group()
        else:
            dist.destroy_process_group()
        if error is not None and self.size > 1 and is_lost_peer(f"{type(error).__name__}: {error}"):
            time.sleep(LOST_PEER_SECONDS)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def agree(self, value: T) -> T:
        """The first rank's value, on every rank. It must be picklable."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value in order of rank, on the first rank; None on the others. It must be picklable."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def sum(self, value: int) -> int:
        """Sum over the ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """Maximum over the ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: int, operation: dist.ReduceOp.RedOpType) -> int:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, operation, group=self.control)
        return int(tensor)


def run_rank(job: Callable[[], int | None]) -> int:
    """Run one rank's part of a job: its exit status.

    An exception is left where the launcher looks for it (torchrun and ``limelight`` both name a file in the
    environment), so that of all ranks' tracebacks the first is shown last; a mistake of the user's is in the log too.
    That another rank has gone is told in a line: that rank knows why, and the log has the traceback.
    """

    def told() -> int | None:
        try:
            return job()
        except UserError as error:
            logger.debug(f"limelight: error: {error}")
            raise

    try:
        return exit_status(record(told))
    except Exception as error:
        if not is_lost_peer(f"{type(error).__name__}: {error}"):
            raise
        logger.debug(traceback.format_exc())
        # gloo begins with a line of its own source, and ends with advice.
        reason = " ".join(str(error).split()).rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or str(error)
        rank = _from_environment("RANK", 0)
        print(f"limelight: rank {rank} has lost another rank: {reason}", file=sys.stderr, flush=True)
        return 1


def local_size() -> int:
    """Ranks on this machine; a launcher that does not say so has them all here."""
    return _from_environment("LOCAL_WORLD_SIZE", _from_environment("LOCAL_SIZE", _from_environment("WORLD_SIZE", 1)))


def control_group() -> dist.ProcessGroup:
    """A gloo group of all ranks: the default one, or one beside it. Collective."""
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    assert group is not None
    return group


def choose_device(device: DeviceChoice, local_rank: int) -> torch.device:
    """The device of the ``local_rank``-th rank of this machine.

    Raises:
        UserError: CUDA is asked for but not there, or there are fewer GPUs than ranks.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "this torch is built for the CPU only" if torch.version.cuda is None else "no usable GPU is here"
        raise UserError(f'train.device = "cuda": {built}; use train.device=cpu, or auto')
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start fewer ranks, or use train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def _quiet_libraries() -> None:
    """Keep notices of libraries about each other, which a user can do nothing about, out of what a job says."""
    for name in ("torchrec", "DeepSpeed", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torch", "torchrec", "fbgemm_gpu", "deepspeed"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}\b")


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment: a launcher sets it to a whole number") from None
