"""Settings of glibc's allocator for processes that work on large arrays."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Options of glibc's ``mallopt``, from its malloc.h."""


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel.

    A training step on a CPU, or a slice of a dataset build, frees and allocates the same hundreds of megabytes again.
    By default glibc maps them anew, page by page: 8,180 page faults in a step of the workload of
    ``benchmarks/speed/throughput.py``, against 624 with these settings.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # Another C library, such as musl.
    for option, bytes_ in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 256 << 20)):
        mallopt(option, bytes_)
