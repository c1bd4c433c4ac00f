"""An exchange in which every id travels once: from a rank to its owner, its row back, and the row's gradient there.

The histories of a batch hold the same items, authors and contexts many times over, in different lookups and in
different rows. Before anything is sent, all ids of a table, whatever lookups they stand in, become the list of the
different ones; rows are spread out again when they are back, and gradients of the same row summed before they go.
TorchRec's own index deduplication has kernels for GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import numba
import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.sparse.exchange import Exchange, Gradients

_GOLDEN = 0x9E3779B97F4A7C15
"""2 ** 64 over the golden ratio: the high bits of a product with it are spread evenly (Knuth, volume 3, 6.4)."""


class DeduplicatedExchange:
    """The part of one step; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        ids: of this rank, for all lookups of a collection.
        tables: lookup name -> name of its table.
        start: begins the exchange of the ids that it is given, which have the same keys.
    """

    def __init__(
        self,
        ids: KeyedJaggedTensor,
        tables: Mapping[str, str],
        start: Callable[[KeyedJaggedTensor], Sequence[Exchange]],
    ) -> None:
        keys = ids.keys()
        pieces = dict(zip(keys, ids.values().split(ids.length_per_key()), strict=True))
        self._members: dict[str, list[str]] = {}
        for key in keys:
            self._members.setdefault(tables[key], []).append(key)
        self._places: dict[str, Tensor] = {}
        different = dict.fromkeys(keys, torch.empty(0, dtype=torch.int64))
        for members in self._members.values():
            # The first lookup of a table stands for all.
            different[members[0]], places = unique_ids([pieces[key] for key in members])
            self._places.update(zip(members, places, strict=True))
        self._sizes = {key: len(unique) for key, unique in different.items()}
        lengths = list(self._sizes.values())
        self._exchanges = start(
            KeyedJaggedTensor(
                keys=keys,
                values=torch.cat(list(different.values())),
                lengths=torch.tensor(lengths),
                stride=1,
                length_per_key=lengths,
            )
        )

    def send(self) -> None:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        for exchange in self._exchanges:
            exchange.send()

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        found = {key: rows for exchange in self._exchanges for key, rows in exchange.rows(step).items()}
        return {
            key: found[members[0]].index_select(0, self._places[key])
            for members in self._members.values()
            for key in members
        }

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        summed: dict[str, Sequence[Tensor]] = {}
        for members in self._members.values():
            dim = gradients[members[0]][0].shape[1]
            total = torch.zeros(self._sizes[members[0]], dim)
            for key in members:
                ends = accumulate((len(part) for part in gradients[key]), initial=0)
                for part, (start, stop) in zip(gradients[key], pairwise(ends), strict=True):
                    _add_rows(total.numpy(), self._places[key][start:stop].numpy(), part.contiguous().numpy())
                summed[key] = [torch.empty(0, dim)]
            summed[members[0]] = [total]
        for exchange in self._exchanges:
            exchange.update(summed, scale)

    def drain(self) -> None:
        """See :class:`trainer.sparse.exchange.Exchange`."""
        for exchange in self._exchanges:
            exchange.drain()


def unique_ids(pieces: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The different ids of some lists, in the order in which they first appear, and where each id stands among them.

    Args:
        pieces: int64 each, on the CPU.

    Returns:
        ``[different]`` int64, and for each list ``[ids]`` int32, places in it.
    """
    ids = torch.cat(list(pieces))
    unique, places = _different(ids.numpy())
    return torch.from_numpy(unique), list(torch.from_numpy(places).split([len(piece) for piece in pieces]))


@numba.njit(cache=True, nogil=True)
def _different(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash table with open addressing, at most half full, whose slots hold places among the different ids."""
    bits = 4
    while (1 << bits) < 2 * len(ids):
        bits += 1
    slots, mask = np.full(1 << bits, -1, np.int32), (1 << bits) - 1
    unique, places, found = np.empty(len(ids), np.int64), np.empty(len(ids), np.int32), 0
    for i in range(len(ids)):
        slot = np.int64((np.uint64(ids[i]) * np.uint64(_GOLDEN)) >> np.uint64(64 - bits))
        while slots[slot] >= 0 and unique[slots[slot]] != ids[i]:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = found
            unique[found] = ids[i]
            found += 1
        places[i] = slots[slot]
    return unique[:found].copy(), places


@numba.njit(cache=True, nogil=True)
def _add_rows(total: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
    """``total[places[i]] += rows[i]``, in order."""
    for i in range(len(places)):
        place = places[i]
        for column in range(total.shape[1]):
            total[place, column] += rows[i, column]
