"""What this machine has: cores, an NVIDIA driver, free ports.

Standard library only: the set-up asks before there is a ``.venv``.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, and in a container the CPU quota of the control group."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def has_nvidia_driver() -> bool:
    """Whether the NVIDIA kernel driver is loaded and shows at least one device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/version").exists()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def port_in_use(port: int) -> bool:
    """Whether another process holds ``port`` on any address of this machine."""
    with socket.socket() as probe:
        # As the rendezvous store does: a port that only waits out an old connection is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False
