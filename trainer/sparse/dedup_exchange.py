"""Exchange that sends every id once per step: one id to the owner, one row back, one gradient to the owner.

The histories of a batch hold the same items, authors and contexts many times, in different lookups and in different
rows. Before anything is sent, the ids of all lookups of a table are reduced to the list of unique ids. Rows are copied
to every place of their id when they return, and the gradients of one row are summed before they are sent. TorchRec's
own index deduplication has kernels for GPUs only, and serves its own exchange.

On a GPU the host waits in ``start`` for the number of unique ids of each table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.runtime.unique import find_unique
from trainer.sparse.exchange import Exchange, Gradients, pass_to_current_stream
from trainer.sparse.flat_exchange import Copies
from trainer.sparse.row_loops import add_rows


class UniqueExchange(Exchange, Protocol):
    """Exchange that carries unique ids: it can return copies of their rows, and takes their gradients as one tensor."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of its lookups, in the order of the joined gradients."""

    def rows(self, step: int | None = None, copies: Copies | None = None) -> dict[str, Tensor]:
        """Return the rows of its ids, or of copies of them; see ``trainer.sparse.flat_exchange.FlatExchange``."""

    def update_joined(self, gradients: Tensor, scale: float | Tensor) -> None:
        """Train the tables on gradients ``[ids, dim]`` of all lookups, whose memory may be overwritten."""


class DeduplicatedExchange:
    """Exchange of the unique ids of one step; see :class:`trainer.sparse.exchange.Exchange`.

    Args:
        ids: ids of this rank, for all lookups of a collection.
        tables: lookup name -> name of its table.
        make_exchanges: makes the exchanges that carry the unique ids, which it gets with the same keys as ``ids``.
        device_form: True for operations that any device has, False for the faster ones of a CPU.
    """

    def __init__(
        self,
        ids: KeyedJaggedTensor,
        tables: Mapping[str, str],
        make_exchanges: Callable[[KeyedJaggedTensor], Sequence[UniqueExchange]],
        *,
        device_form: bool = False,
    ) -> None:
        self._ids, self._tables, self._make_exchanges, self._device_form = ids, tables, make_exchanges, device_form
        self._members: dict[str, list[str]] = {}
        keys: list[str] = ids.keys()
        for key in keys:
            self._members.setdefault(tables[key], []).append(key)

    def start(self) -> None:
        """Find the unique ids of every table and start the exchanges that carry them.

        Raises:
            UserError: an id is outside its table; :meth:`send` raises it if that of the exchanges does.
        """
        self._stream = torch.cuda.current_stream() if self._ids.values().is_cuda else None
        self._exchanges = self._make_exchanges(self._find_unique_ids())
        for exchange in self._exchanges:
            exchange.start()

    def send(self) -> None:
        """Start to send the unique ids.

        Raises:
            UserError: an id is outside its table; see :meth:`start`.
        """
        for exchange in self._exchanges:
            exchange.send()

    def rows(self, step: int | None = None) -> dict[str, Tensor]:
        """Receive the rows of the unique ids and copy each one to all places of its id."""
        if self._stream is not None:
            pass_to_current_stream(self._stream, self._places.values())
        found: dict[str, Tensor] = {}
        for exchange in self._exchanges:
            copies = {key: (self._members[self._tables[key]][0], self._places[key]) for key in exchange.keys}
            found |= exchange.rows(step, copies)
        return {key: found[key] for members in self._members.values() for key in members}

    def update(self, gradients: Gradients, scale: float | Tensor) -> None:
        """Sum the gradients of each unique id on this rank and train the tables on the sums."""
        for exchange in self._exchanges:
            sizes = [self._sizes[key] for key in exchange.keys]
            example = gradients[exchange.keys[0]][0]
            # One tensor, since the exchange would join several.
            total = example.new_zeros(sum(sizes), example.shape[1])
            sums = dict(zip(exchange.keys, total.split(sizes), strict=True))
            for members in self._members.values():
                for key in members:
                    if key in sums:
                        self._add(gradients[key], self._places[key], sums[members[0]])
            exchange.update_joined(total, scale)

    def _add(self, parts: Sequence[Tensor], places: Tensor, total: Tensor) -> None:
        """Add the gradients of a lookup, in consecutive parts, to those of the unique ids at some places."""
        ends = accumulate((len(part) for part in parts), initial=0)
        for part, (start, stop) in zip(parts, pairwise(ends), strict=True):
            if self._device_form:
                total.index_add_(0, places[start:stop], part)
            else:
                add_rows(total.numpy(), places[start:stop].numpy(), part.contiguous().numpy(), 1.0)

    def drain(self) -> None:
        """Wait for the unique ids and discard them."""
        for exchange in self._exchanges:
            exchange.drain()

    def _find_unique_ids(self) -> KeyedJaggedTensor:
        """Return the unique ids of each table under the key of its first lookup; its other lookups are empty."""
        keys = self._ids.keys()
        by_lookup = dict(zip(keys, self._ids.values().split(self._ids.length_per_key()), strict=True))
        self._places: dict[str, Tensor] = {}
        unique = dict.fromkeys(keys, self._ids.values()[:0])
        find = unique_ids_on_device if self._device_form else unique_ids
        for members in self._members.values():
            unique[members[0]], places = find([by_lookup[key] for key in members])
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


def unique_ids_on_device(lists: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Do the same as :func:`unique_ids` on any device, with the unique ids in ascending order and int64 places."""
    unique, places = torch.cat(list(lists)).unique(return_inverse=True)
    return unique, list(places.split([len(of_list) for of_list in lists]))
