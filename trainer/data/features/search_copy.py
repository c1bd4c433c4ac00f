"""A loader process's own copy of the search vectors, in large pages.

Searches read vectors in random order, and reads from small pages also wait for the place of their page. Vectors of
trained tables lie in memory that the rank shares with its loader processes, since they are renewed after the fork.
Linux gives large pages to shared memory only if the administrator allows it (``shmem_enabled``), and to memory of one
process mostly. So a loader process copies each version once, when it makes the first batch with it.
"""

from __future__ import annotations

import numpy as np

from trainer.data.features.search_vectors import SearchSpace, large_memory
from trainer.runtime.free_memory import free_memory
from trainer.runtime.large_pages import large_pages_setting, shared_memory_has_large_pages

LEAST_BYTES = 16 << 20
"""Size of the smallest version that is copied: a processor remembers the places of small pages for about as much."""

SHARE_OF_FREE = 0.25
"""Largest share of the free memory that the copies of all processes of a machine take together."""


class SearchCopy:
    """Search vectors as one process reads them: its own copy where that is faster, else the shared memory.

    Both have the same values, so a search finds the same entries.

    Args:
        space: search space of the rank.
        processes: number of processes on this machine that may make a copy.
    """

    def __init__(self, space: SearchSpace, processes: int) -> None:
        self._space = space
        self._place: np.ndarray | None = None
        self._version: int | None = None
        if space.shared and pays(space.version_bytes, processes):
            self._place = np.frombuffer(large_memory(space.version_bytes), np.uint8)

    @property
    def is_copy(self) -> bool:
        """True if this process has a copy of its own."""
        return self._place is not None

    def at(self, version: int) -> dict[str, np.ndarray]:
        """Return table -> vectors of a version, as :meth:`SearchSpace.at`; valid until another version is asked for."""
        if self._place is None:
            return self._space.at(version)
        if version != self._version:
            np.copyto(self._place, self._space.bytes_of(version))
            self._version = version
        return self._space.views(self._place, version)


def pays(version_bytes: int, processes: int) -> bool:
    """Return whether each of some processes should copy a version: large pages, if there are any, and free memory.

    Args:
        version_bytes: size of a version.
        processes: number of processes on this machine that may make a copy.
    """
    if version_bytes < LEAST_BYTES or shared_memory_has_large_pages():
        return False
    if large_pages_setting() not in ("always", "madvise"):
        return False
    free = free_memory()
    return free is not None and version_bytes * processes <= SHARE_OF_FREE * free
