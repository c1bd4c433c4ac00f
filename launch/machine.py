"""NVIDIA driver and free ports of this machine.

Standard library only: the set-up runs before there is a ``.venv``.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import subprocess
from pathlib import Path


def has_nvidia_driver() -> bool:
    """True if the NVIDIA kernel driver is loaded and shows at least one device."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/version").exists()


CUDA_BUILD = "13.0"
"""CUDA version of the pinned torch and fbgemm."""

OLDEST_DRIVER = {12: 525, 13: 580}
"""Oldest NVIDIA driver on Linux that runs programs built for a major version of CUDA (CUDA release notes, table 3)."""


def nvidia_driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as ``580.65.06``; None if unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    texts = []
    # nvidia-smi hangs if a GPU does, and a container may lack it; the kernel's file names the version too.
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        texts.append(subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout)
    with contextlib.suppress(OSError):
        texts.append(Path("/proc/driver/nvidia/version").read_text())
    for text in texts:
        found = re.search(r"(?:^|\s)(\d{3,}\.\d+(?:\.\d+)?)(?:\s|$)", text)
        if found:
            return found[1]
    return None


def driver_too_old(version: str | None, cuda: str) -> str | None:
    """Return a phrase that names the driver which a CUDA version needs, if the installed one is older; else None.

    Args:
        version: of the driver; None if unknown.
        cuda: version of CUDA, such as ``13.0``.
    """
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if version is None or needed is None or int(version.split(".")[0]) >= needed:
        return None
    return f"CUDA {cuda} needs an NVIDIA driver of {needed} or newer, and this machine has {version}"


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
