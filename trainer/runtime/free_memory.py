"""Memory that a process can still get: of the machine, and of its container."""

from __future__ import annotations

from pathlib import Path

PROC, SYSFS = Path("/proc"), Path("/sys")
"""Linux's file systems of processes and of devices."""


def free_memory(proc: Path = PROC, sysfs: Path = SYSFS) -> int | None:
    """Return the bytes that machine and container still have, cached files included; None if Linux says neither."""
    known = [size for size in (_of_machine(proc), _of_container(sysfs / "fs/cgroup")) if size is not None]
    return min(known, default=None)


def _of_machine(proc: Path) -> int | None:
    """Return the bytes that are free or cached on the machine."""
    kilobytes = _fields(proc / "meminfo").get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _of_container(directory: Path) -> int | None:
    """Return the bytes that a container's cgroup may still take; None without a limit."""
    try:
        limit = int((directory / "memory.max").read_text())
        used = int((directory / "memory.current").read_text())
    except (OSError, ValueError):
        return None  # No cgroup of version 2, or its limit is "max".
    # Cached files that were not read lately are given up first.
    return max(0, limit - used + _fields(directory / "memory.stat").get("inactive_file", 0))


def _fields(file: Path) -> dict[str, int]:
    """Return the first two words of each line, the second as a number; nothing if the file cannot be read."""
    try:
        words = [line.split() for line in file.read_text().splitlines()]
        return {line[0]: int(line[1]) for line in words if len(line) > 1}
    except (OSError, ValueError):
        return {}
