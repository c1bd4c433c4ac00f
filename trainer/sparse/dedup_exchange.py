"""Exchange that sends every id once per step: one id to the owner, one row back, one gradient to the owner.

The histories of a batch hold the same items, authors and contexts many times, in different lookups and in different
rows. Before anything is sent, the ids of all lookups of a table are reduced to the list of unique ids. Rows are copied
to every place of their id when they return, and the gradients of one row are summed before they are sent. TorchRec's
own index deduplication has kernels for GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.compiled import compiled
from trainer.runtime.unique import find_unique
from trainer.sparse.exchange import Exchange, Gradients


class DeduplicatedExchange:
    """Exchange of the unique ids of one step; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        ids: ids of this rank, for all lookups of a collection.
        tables: lookup name -> name of its table.
        make_exchanges: makes the exchanges that carry the unique ids, which it gets with the same keys as ``ids``.
    """

    def __init__(
        self,
        ids: KeyedJaggedTensor,
        tables: Mapping[str, str],
        make_exchanges: Callable[[KeyedJaggedTensor], Sequence[Exchange]],
    ) -> None:
        self._ids, self._make_exchanges = ids, make_exchanges
        self._members: dict[str, list[str]] = {}
        keys: list[str] = ids.keys()
        for key in keys:
            self._members.setdefault(tables[key], []).append(key)

    def start(self) -> None:
        """Find the unique ids of every table and start the exchanges that carry them.

        Raises:
            UserError: an id is outside its table.
        """
        self._exchanges = self._make_exchanges(self._find_unique_ids())
        for exchange in self._exchanges:
            exchange.start()

    def send(self) -> None:
        """Start to send the unique ids."""
        for exchange in self._exchanges:
            exchange.send()

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Receive the rows of the unique ids and copy each one to all places of its id."""
        unique_rows = {key: rows for exchange in self._exchanges for key, rows in exchange.rows(step).items()}
        return {
            key: unique_rows[members[0]].index_select(0, self._places[key])
            for members in self._members.values()
            for key in members
        }

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Sum the gradients of each unique id on this rank and train the tables on the sums."""
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
        """Wait for the unique ids and discard them."""
        for exchange in self._exchanges:
            exchange.drain()

    def _find_unique_ids(self) -> KeyedJaggedTensor:
        """Return the unique ids of each table under the key of its first lookup; its other lookups are empty."""
        keys = self._ids.keys()
        by_lookup = dict(zip(keys, self._ids.values().split(self._ids.length_per_key()), strict=True))
        self._places: dict[str, Tensor] = {}
        unique = dict.fromkeys(keys, torch.empty(0, dtype=torch.int64))
        for members in self._members.values():
            unique[members[0]], places = unique_ids([by_lookup[key] for key in members])
            self._places.update(zip(members, places, strict=True))
        self._sizes = {key: len(ids) for key, ids in unique.items()}
        lengths = list(self._sizes.values())
        return KeyedJaggedTensor(
            keys=keys,
            values=torch.cat(list(unique.values())),
            lengths=torch.tensor(lengths),
            stride=1,
            length_per_key=lengths,
        )


def unique_ids(lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the unique ids of some lists, in order of first appearance, and the place of each id among them.

    Args:
        lists: int64 tensors on the CPU.

    Returns:
        The unique ids ``[unique]`` int64; and for each list ``[ids]`` int32, index of each id in the unique ids.
    """
    ids = torch.cat(list(lists))
    unique, places = find_unique(ids.numpy())
    return torch.from_numpy(unique), list(torch.from_numpy(places).split([len(of_list) for of_list in lists]))


@compiled(nogil=True)
def _add_rows(total: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
    """Add ``rows[i]`` to ``total[places[i]]`` for every ``i``, in order."""
    for i in range(len(places)):
        place = places[i]
        for column in range(total.shape[1]):
            total[place, column] += rows[i, column]
