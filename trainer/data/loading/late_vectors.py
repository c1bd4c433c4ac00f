"""Pre-trained vectors of a batch whose number the host does not know yet."""

from __future__ import annotations

import torch
from torch import Tensor

from modules.content import BatchVectors
from trainer.runtime.host_copy import HostCopy


class LateVectors:
    """Vectors of one table for a batch that a device has searched.

    The device numbers the distinct vectors of a batch. A copy of their number is queued when this is made, and read in
    a later step, when the network is about to read the vectors.

    Args:
        known: vectors of the candidates, as the loader found them.
        keys: rows in the table of the distinct vectors, ``[ids]`` int64, in order: first those of the candidates. Only
            the first ``count`` are used.
        count: scalar int64 on the device, number of distinct vectors.
        table: all vectors, ``[rows, width]``.
        places: lookup -> index of each id's vector, see :class:`modules.content.BatchVectors`.
    """

    def __init__(
        self, known: BatchVectors, keys: Tensor, count: Tensor, table: Tensor, places: dict[str, Tensor]
    ) -> None:
        self._known, self._keys, self._table, self._places = known, keys, table, places
        self._count = HostCopy([count])

    def tensors(self) -> list[Tensor]:
        """Return the tensors that belong to this batch alone, without those of the candidates."""
        return [self._keys, *self._places.values()]

    def read(self) -> BatchVectors:
        """Return the vectors; on a GPU this waits until the device has counted them."""
        (count,) = self._count.numbers()
        known = self._known.vectors
        found = self._table[self._keys[len(known) : int(count)]].to(known.dtype)
        return BatchVectors(torch.cat([known, found]), self._places, self._known.entries)
