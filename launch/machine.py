"""Cores, NVIDIA driver and free ports of this machine.

Standard library only: the set-up runs before there is a ``.venv``.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path


def available_cores() -> int:
    """Return the number of cores of this process: its CPU affinity, and in a container the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def has_nvidia_driver() -> bool:
    """True if the NVIDIA kernel driver is loaded and shows at least one device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/version").exists()


def free_port() -> int:
    """Return a TCP port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def port_in_use(port: int) -> bool:
    """True if another process holds ``port`` on any address of this machine."""
    with socket.socket() as probe:
        # As the rendezvous store sets it: a port in TIME_WAIT after an old connection is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False
