"""Splits a batch of rows of unequal length into blocks that fit into a core's cache and have little padding."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_VALUES = 1 << 20
"""Values of a block on a CPU, 4 MiB of float32. Smaller blocks cost more in function calls than they gain."""


@dataclass(frozen=True)
class Block:
    """Rows that are computed together, each with ``length`` places for entries; a row's own entries are at the end.

    Attributes:
        rows: selects the rows from the batch: a slice if the rows are neighbours and full, else ``[rows]`` int64.
        entries: selects the places from all entries: a slice as above, else ``[rows * length]`` int64, 0 for padding.
        length: places of each row.
        padding: ``[rows, length]`` bool, True for places before a row's own entries; None if all rows are full.
    """

    rows: slice | Tensor
    entries: slice | Tensor
    length: int
    padding: Tensor | None = None

    def targets(self, spare: int) -> slice | Tensor:
        """Return ``entries`` with ``spare`` in place of 0 for padding: places where gradients of entries are written.

        No place but ``spare`` occurs twice, so that nothing has to be added up: on a GPU, atomic additions of all
        padding to one row would wait for each other.
        """
        if self.padding is None:
            return self.entries
        assert isinstance(self.entries, Tensor)
        return self.entries.masked_fill(self.padding.flatten(), spare)


def reads_lengths(device: torch.device) -> bool:
    """True if blocks depend on the lengths of the rows, which only a CPU reads without waiting."""
    return device.type == "cpu"


def cut_rows(lengths: Tensor, entries: int, max_length: int, row_values: int, entry_values: int) -> Iterator[Block]:
    """Split a batch into blocks of at most about ``BLOCK_VALUES`` values, longest rows first for little padding.

    A block that is at least a quarter full ends at the first row that is shorter than its longest one by more than a
    sixteenth: ending earlier would save less padding than the additional calls cost. For 1,024 rows of 0 to 100
    entries, 5 % of the places are padding. On a GPU the whole batch is one block, since reading the lengths would make
    the host wait.

    Args:
        lengths: number of entries of each row, ``[batch]`` int64.
        entries: sum of ``lengths``.
        max_length: largest possible number of entries of a row.
        row_values: values that a row needs independently of its length.
        entry_values: values that a place for an entry needs.
    """
    batch = len(lengths)

    def rows_of(length: int) -> int:
        return max(1, BLOCK_VALUES // (row_values + length * entry_values))

    if entries == 0:
        return
    if not reads_lengths(lengths.device):
        # Without a loop, a program that torch.compile makes of it is the same for all numbers of rows.
        yield _whole_batch(lengths, entries, max_length)
        return
    if entries == batch * max_length:
        step = rows_of(max_length)
        for start in range(0, batch, step):
            stop = min(start + step, batch)
            yield Block(slice(start, stop), slice(start * max_length, stop * max_length), max_length)
        return
    stops = lengths.cumsum(0)
    ordered, order = lengths.sort(descending=True)
    longest = ordered.tolist()
    start = 0
    while start < batch and longest[start]:
        length = longest[start]
        rows = rows_of(length)
        stop = min(start + rows, batch)
        shortest = length - length // 16
        too_short = bisect.bisect_left(longest, 1 - shortest, start, stop, key=operator.neg)
        stop = min(stop, max(too_short, start + rows // 4))
        part = slice(start, stop)
        yield _padded(order[part], stops[order[part]], ordered[part], length)
        start = stop


def _whole_batch(lengths: Tensor, entries: int, max_length: int) -> Block:
    """Return all rows of a batch as one block, the longest rows first."""
    batch = len(lengths)
    if entries == batch * max_length:
        return Block(slice(0, batch), slice(0, entries), max_length)
    stops = lengths.cumsum(0)
    ordered, order = lengths.sort(descending=True)
    return _padded(order, stops[order], ordered, max_length)


def _padded(rows: Tensor, stops: Tensor, lengths: Tensor, length: int) -> Block:
    """Return a block of ``rows``, whose entries end before the place ``stops`` and are ``lengths``, with padding."""
    place = torch.arange(-length, 0, device=lengths.device)
    padding = place < -lengths[:, None]
    index = (stops[:, None] + place).masked_fill_(padding, 0)
    return Block(rows, index.flatten(), length, padding)


def take(values: Tensor, which: slice | Tensor) -> Tensor:
    """Return the rows of ``values`` that a block selects."""
    return values[which] if isinstance(which, slice) else values.index_select(0, which)
