"""Check that ids are rows of their tables, on the host or on a device that the host does not wait for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig

from trainer.console.errors import UserError
from trainer.runtime.host_copy import HostCopy
from trainer.sparse.device_kernel import spread


def check_range(table: EmbeddingConfig, ids: Tensor) -> None:
    """Check ids ``[n]`` int64 in the memory of the host.

    Raises:
        UserError: an id is negative or at least the number of rows.
    """
    if len(ids):
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= table.num_embeddings:
            raise _outside(table, low if low < 0 else high)


class RangeCheck:
    """Check of ids on a device, whose result is read later.

    Args:
        ids: ``[n]`` int64, lookup after lookup.
        sizes: number of ids of each lookup.
        tables: TorchRec's configuration of each lookup's table.

    Attributes:
        inside: ``[n]`` int64, the ids with 0, the row of the unknown id, in place of those outside of their tables.
    """

    def __init__(self, ids: Tensor, sizes: Sequence[int], tables: Sequence[EmbeddingConfig]) -> None:
        self._ends, self._tables = list(accumulate(sizes)), tables
        rows = torch.tensor([table.num_embeddings for table in tables], dtype=torch.int64)
        limits = spread(rows, torch.tensor(sizes, dtype=torch.int64), len(ids), ids.device)
        outside = (ids < 0) | (ids >= limits)
        self.inside = ids.masked_fill(outside, 0)
        first: list[Tensor] = []
        if len(ids):
            place = outside.to(torch.int8).argmax()[None]
            first = [torch.cat([outside.any()[None].long(), place, ids.index_select(0, place)])]
        self._first = HostCopy(first)

    def raise_if_outside(self) -> None:
        """Wait for the check, and raise its error.

        Raises:
            UserError: an id was negative or at least the number of rows of its table.
        """
        for first in self._first.read():
            found, place, id_ = first.tolist()
            if found:
                raise _outside(self._tables[bisect_right(self._ends, place)], id_)


def _outside(table: EmbeddingConfig, id_: int) -> UserError:
    return UserError(f"id {id_} is not a row of table {table.name!r}, which has {table.num_embeddings:,}")
