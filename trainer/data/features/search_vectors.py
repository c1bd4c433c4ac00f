"""The vectors that histories are searched with: two versions, in memory that a rank shares with its loader's processes.

Version 0 is there from the start, version k is a copy of the tables after step ``k * refresh_steps``. Batches are made
ahead of their step, by processes that do not wait for it; which version a batch is searched with must not depend on how
far ahead. So the batches of steps ``k * refresh_steps + 1`` to ``(k + 1) * refresh_steps`` use version ``k - 1``: made
long before, however many are prefetched, and the same after a resume. When version k is written, into the place of
``k - 2``, the last batch that used that one has been trained on.
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
"""The largest absolute value of a version becomes so much as int8."""

HALF_LIMIT = 65504.0
"""The largest float16; what is larger is stored as this."""


class SpaceTable(NamedTuple):
    """The search vectors of one table.

    Attributes:
        rows: of the table.
        dim: of its embeddings.
    """

    rows: int
    dim: int


class SearchSpace:
    """Search vectors of all tables, in two versions.

    Args:
        tables: name -> sizes, in the first version.
        later: likewise in all others; the same unless the first version is made of something else.
        dtype: ``float16`` or ``int8``.
        refresh_steps: between two versions; 0 if the first one stays.
        forked: whether processes forked before a version is put are to see it.

    Attributes:
        refresh_steps: as given.
        newest: version that was put last; -1 before the first.
    """

    def __init__(
        self,
        tables: Mapping[str, SpaceTable],
        later: Mapping[str, SpaceTable],
        dtype: str,
        refresh_steps: int,
        forked: bool = True,
    ) -> None:
        self.refresh_steps, self.newest = refresh_steps, -1
        self._dtype = np.dtype(dtype)
        self._tables = (dict(tables), dict(later))
        size = max(sum(_values(table) for table in each.values()) for each in self._tables)
        self._places = [
            np.frombuffer(_memory(size * self._dtype.itemsize, forked), self._dtype)
            for _ in range(2 if refresh_steps else 1)
        ]

    def tables(self, version: int) -> dict[str, SpaceTable]:
        """The tables of a version and their sizes."""
        return self._tables[version > 0]

    def at(self, version: int) -> dict[str, np.ndarray]:
        """Table -> ``[rows, padded width]`` of a version; views, valid until the version after the next is put."""
        flat, views, begin = self._places[version % len(self._places)], {}, 0
        for name, table in self.tables(version).items():
            width = padded_width(table.dim)
            views[name] = flat[begin : begin + table.rows * width].reshape(-1, width)
            begin += _values(table)
        return views

    def version_of(self, step: int) -> int:
        """The version that a batch is searched with; ``step`` are the steps done before its own."""
        return max(step // self.refresh_steps - 1, 0) if self.refresh_steps else 0

    def is_due(self, step: int) -> bool:
        """Whether a version has to be put after so many steps."""
        return self.refresh_steps > 0 and step > 0 and step % self.refresh_steps == 0

    def quantised(self, values: np.ndarray, largest: float) -> np.ndarray:
        """Values as the space stores them.

        Args:
            values: float32, finite.
            largest: absolute value of the version, over all tables: int8 is scaled by it.
        """
        if self._dtype == np.int8:
            return np.rint(values * (BYTE_RANGE / largest if largest > 0 else 0.0)).astype(np.int8)
        return np.clip(values, -HALF_LIMIT, HALF_LIMIT).astype(np.float16)

    def check_prefetch(self, ahead: int) -> None:
        """A version must be there before the first batch that is made with it.

        Raises:
            UserError: too many batches are made ahead.
        """
        if self.refresh_steps and ahead > self.refresh_steps:
            raise UserError(
                f"features.search.refresh_steps = {self.refresh_steps} is less than the {ahead} batches made ahead; "
                "take more steps, or less data.workers or data.prefetch"
            )

    def state_dict(self) -> dict[str, Any]:
        """The versions that are there, copied: version -> table -> tensor. Empty before the first."""
        versions = range(max(self.newest - len(self._places) + 1, 0), self.newest + 1)
        return {
            str(version): {name: torch.from_numpy(values.copy()) for name, values in self.at(version).items()}
            for version in versions
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            UserError: it has other tables.
        """
        for version, tables in sorted((int(key), tables) for key, tables in state.items()):
            here = self.at(version)
            shapes = {name: tuple(values.shape) for name, values in tables.items()}
            if shapes != {name: values.shape for name, values in here.items()}:
                raise UserError(f"the checkpoint's search vectors are {shapes}, those of this job are of other tables")
            for name, values in tables.items():
                here[name][:] = values.numpy()
            self.newest = version


def _values(table: SpaceTable) -> int:
    """Values that a table takes; the next one begins with a cache line, as a vector should not lie on one more."""
    return -(-table.rows * padded_width(table.dim) // CACHE_LINE) * CACHE_LINE


def _memory(size: int, forked: bool) -> mmap.mmap:
    """Anonymous; in large pages where the system lets it, as vectors are read all over it."""
    # Shared memory has large pages only if the administrator says so (shmem_enabled); a process's own has them mostly.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if forked else mmap.MAP_PRIVATE))
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def stored_space(state: Mapping[str, Mapping[str, Tensor]]) -> SearchSpace:
    """The newest version of a :meth:`SearchSpace.state_dict`, to be read only."""
    newest = state[max(state, key=int)]
    tables = {name: SpaceTable(*values.shape) for name, values in newest.items()}
    dtype = str(next(iter(newest.values())).numpy().dtype)
    space = SearchSpace(tables, tables, dtype, refresh_steps=0, forked=False)
    space.load_state_dict({"0": newest})
    return space
