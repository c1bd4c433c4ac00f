"""Search vectors for histories: two versions, in memory that a rank shares with its loader's worker processes.

Version 0 exists from the start; version k is a copy of the tables after step ``k * refresh_steps``. Workers make
batches ahead of their step and do not wait for it, and the version that a batch uses must not depend on how far ahead
it is made. So the batches of steps ``k * refresh_steps + 1`` to ``(k + 1) * refresh_steps`` use version ``k - 1``. That
version was written long before, however many batches are prefetched, and it is the same after a resume. Version k
overwrites version ``k - 2``; by then the last batch that used ``k - 2`` has been trained on.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modules.search.cpu_intrinsics import CACHE_LINE
from modules.search.search import padded_width
from trainer.console.errors import UserError

BYTE_RANGE = 127
"""Int8 value that stands for the largest absolute value of a version."""

HALF_LIMIT = 65504.0
"""Largest finite float16; larger values are stored as this one."""


class SpaceTable(NamedTuple):
    """Size of the search vectors of one table.

    Attributes:
        rows: number of rows of the table.
        dim: number of elements of an embedding.
    """

    rows: int
    dim: int


class SearchSpace:
    """Search vectors of all tables, in two versions.

    Args:
        tables: name -> size of each table in the first version.
        later: name -> size in all later versions; different if the first version has another source.
        dtype: ``float16`` or ``int8``.
        refresh_steps: steps between two versions; 0 if the first version is never replaced.
        forked: True if processes forked before a version is written must see it.

    Attributes:
        refresh_steps: as given.
        shared: ``forked``, as given.
        version_bytes: size of the memory of a version.
        newest: version that was written last; -1 before the first.
    """

    def __init__(
        self,
        tables: Mapping[str, SpaceTable],
        later: Mapping[str, SpaceTable],
        dtype: str,
        refresh_steps: int,
        forked: bool = True,
    ) -> None:
        self.refresh_steps, self.shared, self.newest = refresh_steps, forked, -1
        self._dtype = np.dtype(dtype)
        self._tables = (dict(tables), dict(later))
        # Memory is mapped once with the larger size, because forked workers cannot see a later mapping.
        size = max(sum(_values(table) for table in each.values()) for each in self._tables)
        self.version_bytes = size * self._dtype.itemsize
        self._places = [
            np.frombuffer(large_memory(self.version_bytes, forked), np.uint8) for _ in range(2 if refresh_steps else 1)
        ]

    def tables(self, version: int) -> dict[str, SpaceTable]:
        """Return the tables of a version and their sizes."""
        return self._tables[version > 0]

    def at(self, version: int) -> dict[str, np.ndarray]:
        """Return table -> vectors ``[rows, padded width]`` of a version.

        The arrays are views; they are valid until the version after the next is written.
        """
        return self.views(self.bytes_of(version), version)

    def bytes_of(self, version: int) -> np.ndarray:
        """Return the memory of a version, ``[version_bytes]`` uint8."""
        return self._places[version % len(self._places)]

    def views(self, memory: np.ndarray, version: int) -> dict[str, np.ndarray]:
        """Return what :meth:`at` returns, in other memory that holds the same bytes.

        Args:
            memory: ``[version_bytes]`` uint8.
            version: version that it holds.
        """
        flat, views, begin = memory.view(self._dtype), {}, 0
        for name, table in self.tables(version).items():
            width = padded_width(table.dim)
            views[name] = flat[begin : begin + table.rows * width].reshape(-1, width)
            begin += _values(table)
        return views

    def version_of(self, step: int) -> int:
        """Return the version that a batch uses; ``step`` is the number of steps done before the step of the batch."""
        # One interval behind the newest copy: see the module's docstring.
        return max(step // self.refresh_steps - 1, 0) if self.refresh_steps else 0

    def is_due(self, step: int) -> bool:
        """True if a new version must be written after ``step`` steps."""
        return self.refresh_steps > 0 and step > 0 and step % self.refresh_steps == 0

    def quantised(self, values: np.ndarray, largest: float) -> np.ndarray:
        """Convert values to the type of the search vectors.

        Args:
            values: float32, finite.
            largest: largest absolute value of the version over all tables; int8 values are scaled by it.
        """
        # One scale for all tables keeps the sum of their dot products in proportion.
        if self._dtype == np.int8:
            return np.rint(values * (BYTE_RANGE / largest if largest > 0 else 0.0)).astype(np.int8)
        return np.clip(values, -HALF_LIMIT, HALF_LIMIT).astype(np.float16)

    def check_prefetch(self, ahead: int) -> None:
        """Check that each version is written before the first batch that uses it is made.

        Args:
            ahead: largest number of batches made ahead of the step that was done last.

        Raises:
            UserError: too many batches are made ahead.
        """
        if self.refresh_steps and ahead > self.refresh_steps:
            raise UserError(
                f"features.search.refresh_steps = {self.refresh_steps} is less than the {ahead} batches made ahead; "
                "raise it, or lower data.workers or data.prefetch"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the existing versions: version -> table -> tensor. Empty before the first version."""
        versions = range(max(self.newest - len(self._places) + 1, 0), self.newest + 1)
        return {
            str(version): {name: torch.from_numpy(values.copy()) for name, values in self.at(version).items()}
            for version in versions
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the versions of a :meth:`state_dict`.

        Raises:
            UserError: the saved tables have other names or sizes.
        """
        for version, tables in sorted((int(key), tables) for key, tables in state.items()):
            here = self.at(version)
            shapes = {name: tuple(values.shape) for name, values in tables.items()}
            if shapes != {name: values.shape for name, values in here.items()}:
                raise UserError(
                    f"the checkpoint has search vectors {shapes}; this job needs "
                    f"{ ({name: values.shape for name, values in here.items()}) }"
                )
            for name, values in tables.items():
                here[name][:] = values.numpy()
            self.newest = version


def _values(table: SpaceTable) -> int:
    """Return the number of values that a table takes, rounded up so that the next table starts at a cache line.

    Otherwise vectors would cross one more cache line than necessary.
    """
    return -(-table.rows * padded_width(table.dim) // CACHE_LINE) * CACHE_LINE


def large_memory(size: int, forked: bool = False) -> mmap.mmap:
    """Return anonymous memory, in large pages if the system allows it: searches read it in random order.

    Args:
        size: bytes.
        forked: True if processes that are forked later must see what is written after the fork.
    """
    # Shared memory gets large pages only if the administrator enables them (shmem_enabled); private memory mostly does.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if forked else mmap.MAP_PRIVATE))
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def stored_space(state: Mapping[str, Mapping[str, Tensor]]) -> SearchSpace:
    """Return a read-only search space with the newest version of a :meth:`SearchSpace.state_dict`."""
    newest = state[max(state, key=int)]
    tables = {name: SpaceTable(*values.shape) for name, values in newest.items()}
    dtype = str(next(iter(newest.values())).numpy().dtype)
    space = SearchSpace(tables, tables, dtype, refresh_steps=0, forked=False)
    space.load_state_dict({"0": newest})
    return space
