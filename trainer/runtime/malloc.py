"""How a process that works on arrays takes memory from the kernel."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Options of glibc's ``mallopt``, from its malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the kernel.

    A step of training on a CPU, or a slice of a dataset that is being built, frees and takes the same hundreds of
    megabytes again; by default each of them is mapped anew, page by page: 8,180 page faults a step of the workload of
    ``benchmarks/speed/throughput.py``, 624 with these settings.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # Another C library, which has its own ways.
    for option, bytes_ in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 256 << 20)):
        mallopt(option, bytes_)
