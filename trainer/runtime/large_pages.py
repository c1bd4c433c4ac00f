"""Large pages for memory that is read in random order.

A processor remembers the places of some thousand pages. Pages of 4 KiB then cover a few megabytes, and most reads of a
large table also wait for the place of their page; pages of 2 MiB cover gigabytes. Linux gives large pages to memory
for which a program asks, if the administrator allows it.

A fork makes all memory common to both processes, until one of them writes to it. The kernel then copies the small page
that is written, and splits its large page for that. So tables would lose their large pages in the first steps beside
loader processes, and take twice their memory. :func:`without_copies_in_children` leaves them out of a fork.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:  # The doctor reads the settings without torch.
    from torch import Tensor

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
LARGE_PAGE = 2 << 20
"""Bytes of a large page on x86-64, and on ARM with small pages of 4 KiB."""

_MADV_DONTNEED, _MADV_DONTFORK, _MADV_DOFORK, _MADV_HUGEPAGE = 4, 10, 11, 14

_own: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Tensors that only this process reads, by their address; those that still exist."""


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


def shared_memory_has_large_pages() -> bool:
    """Return whether shared memory for which a program asks gets large pages."""
    return large_pages_setting("shmem_enabled") in ("always", "within_size", "advise", "force")


def zero_in_large_pages(values: Tensor) -> bool:
    """Fill a new tensor with zeros, in large pages where the system has any.

    The two ends of the tensor, which do not fill a large page, keep small ones.

    Args:
        values: contiguous tensor on a CPU, whose memory PyTorch has allocated. Only this process reads it: inside
            :func:`without_copies_in_children`, forked processes do not get it.

    Returns:
        True if the kernel took the request; it gives large pages as long as it has free ones.
    """
    taken = large_pages_setting() in ("always", "madvise") and _advise(values, _MADV_HUGEPAGE)
    if taken:
        # Memory that was written before has small pages already; without them, the zeros below get large ones.
        _advise(values, _MADV_DONTNEED)
    values.zero_()
    _own[values.data_ptr()] = values
    return taken


@contextmanager
def without_copies_in_children() -> Iterator[None]:
    """Leave the tensors of :func:`zero_in_large_pages` out of the processes that are forked inside the ``with``.

    They keep their large pages, and their memory is not doubled. A forked process must not read, write or free them:
    it would end with SIGSEGV. Their two ends, which do not fill a large page, are copied as usual.
    """
    kept = list(_own.values())  # Held, so that none is freed, and its memory used for something else, before the end.
    left_out = [values for values in kept if _advise(values, _MADV_DONTFORK)]
    try:
        yield
    finally:
        # The memory of a tensor that is freed later may hold what the next forked processes read.
        for values in left_out:
            _advise(values, _MADV_DOFORK)


def _advise(values: Tensor, advice: int) -> bool:
    """Give the kernel an advice for the part of a tensor that fills large pages; return whether it was taken."""
    begin, size = values.data_ptr(), values.numel() * values.element_size()
    first = -(-begin // LARGE_PAGE) * LARGE_PAGE
    whole = (begin + size - first) // LARGE_PAGE * LARGE_PAGE
    if whole <= 0:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(madvise(first, whole, advice) == 0)
