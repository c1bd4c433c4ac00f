"""The process group of a job: rank, device, backend and timeouts are decided here alone."""

from __future__ import annotations

import logging
import os
import platform
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

from trainer.console.errors import UserError, collective_cause, is_lost_peer
from trainer.console.exit_status import exit_status
from trainer.runtime.cores import bind_to, core_quota, cores_near, own_place, share_of_cores
from trainer.runtime.malloc import keep_freed_memory
from trainer.runtime.network_interfaces import interface_towards, loopback_interface
from trainer.runtime.rendezvous import fresh_part, launcher_store, shared_store

logger = logging.getLogger(__name__)

DeviceChoice = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")

TIMEOUT_SECONDS = 1800
"""A collective fails after waiting this long. The first rank may fit features alone while the others wait."""

LOST_PEER_SECONDS = 1.5
"""Delay before a rank ends because another one was lost. Launchers report the first rank that ends as the cause, and
torchrun compares times in whole seconds."""

_NAMED_HOSTS = 4
"""Hosts that a message names."""


@dataclass
class World:
    """The process group of a job, seen from one rank. A context manager that leaves the group on exit.

    Attributes:
        rank: number of this process, from 0.
        size: number of ranks.
        device: on which this rank computes.
        control: gloo group of all ranks, for small messages between hosts that must not wait for a GPU.
        cores: number of cores that this rank has for itself.
        placement: line about the cores that this rank may use.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup = field(repr=False)
    cores: int = 1
    placement: str = ""

    @staticmethod
    def join(
        device: DeviceChoice = "auto", timeout_seconds: float = TIMEOUT_SECONDS, *, bind_cores: bool = False
    ) -> World:
        """Join the process group that torchrun, deepspeed or ``limelight train`` started; one rank without a launcher.

        Args:
            device: on which the ranks compute.
            timeout_seconds: a collective fails after waiting this long.
            bind_cores: bind this process to the cores of its GPU's NUMA node, if the machine has several nodes.

        Raises:
            UserError: CUDA is requested but not available, there are more ranks than GPUs, or the rendezvous fails.
        """
        rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
        local_rank = _from_environment("LOCAL_RANK", rank)
        chosen = choose_device(device, local_rank)
        _quiet_libraries()
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        else:
            keep_freed_memory()
        # Before the process group, whose threads inherit the cores.
        bound = _bind(chosen) if bind_cores else "train.bind_cores is false"
        # DeepSpeed reads the first variable when it is imported, and requires the second.
        os.environ["DS_ACCELERATOR"] = chosen.type
        os.environ["LOCAL_RANK"] = str(local_rank)
        several_machines = size != local_size()
        # By default gloo binds to the address of the host's name, which other machines often cannot reach.
        master = os.environ.get("MASTER_ADDR", "localhost")
        interface = interface_towards(master) if several_machines else loopback_interface()
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        try:
            agent = shared_store(timeout)
            # One rank without a launcher uses a store in memory, which needs no port.
            store = launcher_store(rank, size, timeout) if agent is None else fresh_part(agent, rank, size, timeout)
            if store is None and "MASTER_PORT" in os.environ and "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                store = dist.HashStore() if store is None else store
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
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
        places: list[Any] = [None] * size
        dist.all_gather_object(places, own_place(), group=control)
        cores = share_of_cores(places, rank, core_quota())
        placement = f"cores: this rank may use {len(places[rank].cores)}, and {cores} of them are its share; {bound}"
        return World(rank, size, chosen, control, cores, placement)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # A rank that leaves early would close connections that slower ranks still read from.
            self.barrier()
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is not None and deepspeed.comm.is_initialized():
            # DeepSpeed keeps groups of its own, which would survive into a later process group.
            deepspeed.comm.destroy_process_group()
        else:
            dist.destroy_process_group()
        if error is not None and self.size > 1 and is_lost_peer(f"{type(error).__name__}: {error}"):
            time.sleep(LOST_PEER_SECONDS)

    def place_on_machine(self) -> tuple[int, int]:
        """Return the number of this rank among those of its machine, and how many they are."""
        return _from_environment("LOCAL_RANK", self.rank), local_size()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def agree(self, value: T) -> T:
        """Return the first rank's value on every rank. The value must be picklable."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_first_rank(self, work: Callable[[], T]) -> T:
        """Return the result of the first rank's work on every rank. Collective; the result must be picklable.

        Raises:
            UserError: the work raised it; every rank raises it.
        """
        result, message = None, None
        if self.rank == 0:
            try:
                result = work()
            except UserError as error:
                message = str(error)
        result, message = self.agree((result, message))
        if message is not None:
            raise UserError(message)
        return result  # type: ignore[return-value]

    def first_problem(self, problem: str | None) -> str | None:
        """Return the first problem of all ranks, with the hosts that have one unless all ranks do. Collective.

        Args:
            problem: why this rank cannot do what the job asks; None if it can.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (problem, platform.node()), group=self.control)
        ranks_of: dict[str, list[int]] = {}
        for rank, (text, host) in enumerate(found):
            if text is not None:
                ranks_of.setdefault(host, []).append(rank)
        ranks = [rank for of_host in ranks_of.values() for rank in of_host]
        if not ranks:
            return None
        first: str = found[min(ranks)][0]
        if len(ranks) == self.size:
            return first
        hosts = [f"{host} (rank {', '.join(map(str, of_host))})" for host, of_host in ranks_of.items()]
        more = f" and {len(hosts) - _NAMED_HOSTS} more hosts" if len(hosts) > _NAMED_HOSTS else ""
        return f"on {', '.join(hosts[:_NAMED_HOSTS])}{more}: {first}"

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks, in order, on the first rank and ``None`` on the others. Picklable values."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def sum(self, value: int) -> int:
        """Return the sum over the ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """Return the maximum over the ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: int, operation: dist.ReduceOp.RedOpType) -> int:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, operation, group=self.control)
        return int(tensor)


def run_rank(job: Callable[[], int | None]) -> int:
    """Run one rank's part of a job and return its exit status.

    An exception is written to the file that the launcher names in the environment (torchrun and ``limelight`` do), so
    that the launcher can show the first one of all ranks. The loss of another rank is printed as one line, with the
    traceback in the log, since only the lost rank knows the cause.
    """

    def logged_job() -> int | None:
        try:
            return job()
        except UserError as error:
            logger.debug(f"limelight: error: {error}")
            raise

    try:
        return exit_status(record(logged_job))
    except Exception as error:
        if not is_lost_peer(f"{type(error).__name__}: {error}"):
            raise
        logger.debug(traceback.format_exc())
        reason = collective_cause(str(error))
        rank = _from_environment("RANK", 0)
        print(f"limelight: rank {rank} has lost another rank: {reason}", file=sys.stderr, flush=True)
        return 1


def local_size() -> int:
    """Return the number of ranks on this machine; all of them if the launcher does not set it."""
    return _from_environment("LOCAL_WORLD_SIZE", _from_environment("LOCAL_SIZE", _from_environment("WORLD_SIZE", 1)))


def control_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks: the default group, or a new one if the default uses another backend.

    Collective.
    """
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    assert group is not None
    return group


def choose_device(device: DeviceChoice, local_rank: int) -> torch.device:
    """Choose the device of the ``local_rank``-th rank of this machine.

    Raises:
        UserError: CUDA is requested but not available, or there are fewer GPUs than ranks.
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


def _bind(device: torch.device) -> str:
    """Bind this process to the cores near its GPU; returns a phrase for the log."""
    allowed = frozenset(os.sched_getaffinity(0))
    if device.type != "cuda":
        return "not bound, since there is no GPU"
    properties: Any = torch.cuda.get_device_properties(device)
    pci = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    cores, why = cores_near(pci, allowed)
    if cores == allowed:
        return f"not bound: {why}"
    bind_to(cores)
    return f"bound to {why}"


def _quiet_libraries() -> None:
    """Hide notices of libraries about each other, which a user cannot act on."""
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
