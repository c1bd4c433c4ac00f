"""Figures of accelerators, from the packaged ``gpus.toml`` and a file of the user, and a cluster of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from trainer.config.sections import Positive, Rate, Section
from trainer.config.toml import read_toml, validate
from trainer.console.errors import UserError

GPU_FILE = Path(__file__).with_name("gpus.toml")
"""File of the accelerators that every installation knows."""

GIGA = 10**9
"""Bytes of a gigabyte, as in data sheets."""


class Accelerator(Section):
    """One accelerator and its share of the server around it."""

    device: Literal["cuda", "cpu"] = Field("cuda", description="Device of PyTorch.")
    memory_gb: Rate = Field(..., description="Memory of the accelerator; of a CPU rank, its share of the host's.")
    memory_gb_per_s: Rate = Field(..., description="Bandwidth of this memory.")
    fp32_tflops: Rate = Field(..., description="Peak of float32, without sparsity.")
    bf16_tflops: Rate = Field(..., description="Peak of bfloat16, without sparsity.")
    nvlink_gb_per_s: Rate = Field(..., description="Bandwidth to the other ranks of the host, in one direction.")
    network_gb_per_s: Rate = Field(..., description="Bandwidth to ranks of other hosts, in one direction.")
    host_memory_gb: Rate = Field(..., description="Share of the host's memory.")
    host_link_gb_per_s: Rate = Field(..., description="Bandwidth between accelerator and host, in one direction.")
    launch_us: Rate = Field(8.0, description="Microseconds of the host for one operation of PyTorch.")
    collective_us: Rate = Field(30.0, description="Microseconds of a collective that sends nothing.")

    @property
    def memory_bytes(self) -> int:
        """Bytes of the accelerator's memory."""
        return round(self.memory_gb * GIGA)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's memory for one rank."""
        return round(self.host_memory_gb * GIGA)

    def flops_per_s(self, *, bf16: bool) -> float:
        """Return the peak rate of products, in FLOP/s."""
        return 1e12 * (self.bf16_tflops if bf16 else self.fp32_tflops)


class Cluster(Section):
    """Equal hosts with equal accelerators, one rank for each of them.

    Attributes:
        name: name of the accelerator.
        gpus: number of ranks.
        hosts: number of hosts.
        accelerator: figures of one rank.
    """

    name: str
    gpus: Positive
    hosts: Positive
    accelerator: Accelerator

    @property
    def per_host(self) -> int:
        """Number of ranks of one host."""
        return self.gpus // self.hosts


@dataclass(frozen=True)
class Peers:
    """Shares of the other ranks of a cluster, as one rank sees them.

    Attributes:
        near: share on the same host.
        far: share on other hosts.
    """

    near: float
    far: float


def peers_of(cluster: Cluster) -> Peers:
    """Return the shares of the other ranks on the same host and on other hosts; zeros for a single rank."""
    others = cluster.gpus - 1
    if not others:
        return Peers(0.0, 0.0)
    near = (cluster.per_host - 1) / others
    return Peers(near, 1 - near)


def read_accelerators(gpu_file: str | Path | None = None) -> dict[str, Accelerator]:
    """Return the known accelerators by name; those of ``gpu_file`` replace packaged ones of the same name.

    Raises:
        UserError: the file is missing or not TOML, or an entry has a wrong key or value.
    """
    found: dict[str, Accelerator] = {}
    for path in (GPU_FILE, *([gpu_file] if gpu_file else [])):
        for name, values in read_toml(path, "file of GPUs").items():
            if not isinstance(values, dict):
                raise UserError(f"{path}: {name} = {values!r}: an accelerator is a section, such as [{name}]")
            found[name] = validate(Accelerator, values, f"{path}: [{name}]")
    return found


def describe_cluster(name: str, gpus: int, hosts: int, gpu_file: str | Path | None = None) -> Cluster:
    """Return a described cluster.

    Args:
        name: name of the accelerator.
        gpus: number of accelerators, one rank each.
        hosts: number of hosts.
        gpu_file: file with more accelerators.

    Raises:
        UserError: the name is unknown, or the accelerators cannot be divided equally among the hosts.
    """
    known = read_accelerators(gpu_file)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        meant = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"--gpu {name}: {meant}known are {', '.join(known)}; --gpu-file adds others")
    if gpus % hosts:
        raise UserError(f"--gpus {gpus} cannot be divided equally among --hosts {hosts}; use a multiple of {hosts}")
    return Cluster(name=name, gpus=gpus, hosts=hosts, accelerator=known[name])
