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
    """Return a TCP port on which nothing listens, and which the kernel gives to no other process for a minute.

    A connection that this side closed first leaves the port in TIME_WAIT. The kernel then chooses it for nobody, but a
    process that names it and sets SO_REUSEADDR, as torch's rendezvous does, may listen on it.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            # The server's side becomes TIME_WAIT only after the client has closed too.
            client.recv(1)
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
