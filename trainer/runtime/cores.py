"""Cores of a process: how many it may use, and those next to a GPU. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SYSFS = Path("/sys")
"""Linux's file system of devices."""

MOST_WORKERS = 8
"""Most loader processes of a rank if its job does not name a number."""

PROC = Path("/proc")
"""Linux's file system of processes."""


class Place(NamedTuple):
    """Place of a process among the processes of a job.

    Attributes:
        host: identity of the kernel, which containers of one machine share and machines of one name do not.
        cores: cores that the process may use.
        group: identity of the cgroup of :func:`core_quota`, which the processes of a container share.
    """

    host: str
    cores: frozenset[int]
    group: str = ""


def own_place(proc: Path = PROC, sysfs: Path = SYSFS) -> Place:
    """Return the place of this process.

    A host's name would not do: containers have names of their own, and two machines may have the same one.
    """
    host = _text(proc / "sys/kernel/random/boot_id") or f"name {platform.node()}"
    try:
        # The number of a cgroup's file is unique on a machine.
        status = (sysfs / "fs/cgroup/cpu.max").stat()
        group = f"{status.st_dev}:{status.st_ino}"
    except OSError:
        group = ""
    return Place(host, frozenset(os.sched_getaffinity(0)), group)


def available_cores() -> int:
    """Return the number of cores of this process: its CPU affinity, and in a container the cgroup's CPU quota."""
    cores, quota = len(os.sched_getaffinity(0)), core_quota()
    return cores if quota is None else max(1, min(cores, quota))


def core_quota(file: Path = SYSFS / "fs/cgroup/cpu.max") -> int | None:
    """Return the whole cores of the cgroup's CPU quota, which may be 0; None if there is no quota."""
    try:
        quota, period = file.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) // int(period)


def share_of_cores(places: Sequence[Place], rank: int, quota: int | None = None) -> int:
    """Return the number of cores that a rank has for itself, at least 1.

    Args:
        places: place of each rank; ranks share the cores that several of them may use.
        rank: the rank.
        quota: cores of all ranks of the rank's cgroup together; None for no limit.
    """
    own = places[rank]
    ranks = [place for place in places if place.host == own.host]
    share = int(sum(1 / sum(core in place.cores for place in ranks) for core in own.cores) + 1e-9)
    if quota is not None:
        share = min(share, quota // sum(place.group == own.group for place in ranks))
    return max(1, share)


def free_cores(cores: int, threads: int) -> int:
    """Return the number of loader processes for a rank with some cores and threads of its own, from 1 to 8."""
    return max(1, min(cores - threads, MOST_WORKERS))


def numa_nodes(sysfs: Path = SYSFS) -> dict[int, frozenset[int]]:
    """Return the cores of each NUMA node that has any; nothing if the kernel does not say."""
    nodes = {}
    for directory in sorted((sysfs / "devices/system/node").glob("node[0-9]*")):
        try:
            cores = _numbers((directory / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if cores:
            nodes[int(directory.name.removeprefix("node"))] = cores
    return nodes


def node_of_device(pci: str, sysfs: Path = SYSFS) -> int | None:
    """Return the NUMA node of a PCI device, such as ``0000:1b:00.0``; None if the kernel does not know it."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def nvidia_gpus(sysfs: Path = SYSFS) -> list[str]:
    """Return the PCI address of each NVIDIA GPU, in order."""
    return [
        device.name
        for device in sorted((sysfs / "bus/pci/devices").glob("*"))
        if _text(device / "vendor") == "0x10de" and _text(device / "class").startswith("0x03")
    ]


def cores_near(pci: str, allowed: frozenset[int], sysfs: Path = SYSFS) -> tuple[frozenset[int], str]:
    """Choose the cores of a process that uses a PCI device.

    Args:
        pci: address of the device.
        allowed: cores that the process may use now.
        sysfs: Linux's file system of devices.

    Returns:
        The cores, and a phrase that says why; ``allowed`` if there is nothing to choose.
    """
    nodes, node = numa_nodes(sysfs), node_of_device(pci, sysfs)
    if len(nodes) < 2:
        return allowed, "the machine has one NUMA node"
    if node is None or node not in nodes:
        return allowed, f"the NUMA node of GPU {pci} is not known"
    near = allowed & nodes[node]
    if not near:
        return allowed, f"a launcher has bound it away from NUMA node {node} of GPU {pci}"
    return near, f"NUMA node {node} of GPU {pci}"


def bind_to(cores: frozenset[int]) -> None:
    """Bind all threads of this process, and those that it starts later, to some cores."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            # The thread has ended.
            continue


def _numbers(text: str) -> frozenset[int]:
    """Return the numbers of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
