"""Large pages for memory that is read in random order.

A processor remembers the places of some thousand pages. Pages of 4 KiB then cover a few megabytes, and most reads of a
large table also wait for the place of their page; pages of 2 MiB cover gigabytes. Linux gives large pages to memory
for which a program asks, if the administrator allows it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # The doctor reads the settings without torch.
    from torch import Tensor

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
LARGE_PAGE = 2 << 20
"""Bytes of a large page on x86-64, and on ARM with small pages of 4 KiB."""

_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14


def large_pages_setting(memory: str = "enabled") -> str | None:
    """Return which memory gets large pages, such as ``always``, ``madvise`` or ``never``; None if there are none.

    Args:
        memory: ``enabled`` for memory of one process, ``shmem_enabled`` for shared memory.
    """
    try:
        words = (SETTINGS / memory).read_text().split()
    except OSError:
        return None
    return next((word[1:-1] for word in words if word.startswith("[")), None)


def zero_in_large_pages(values: Tensor) -> bool:
    """Fill a new tensor with zeros, in large pages where the system has any.

    The two ends of the tensor, which do not fill a large page, keep small ones.

    Args:
        values: contiguous tensor on a CPU, whose memory PyTorch has allocated.

    Returns:
        True if the kernel took the request; it gives large pages as long as it has free ones.
    """
    begin, size = values.data_ptr(), values.numel() * values.element_size()
    first = -(-begin // LARGE_PAGE) * LARGE_PAGE
    whole = (begin + size - first) // LARGE_PAGE * LARGE_PAGE
    taken = False
    if whole > 0 and large_pages_setting() in ("always", "madvise"):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        taken = madvise(first, whole, _MADV_HUGEPAGE) == 0
        if taken:
            # Memory that was written before has small pages already; without them, the zeros below get large ones.
            madvise(first, whole, _MADV_DONTNEED)
    values.zero_()
    return taken
