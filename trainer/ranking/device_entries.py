"""Columns of history entries on a device: what its searches read, and what the entries that they find give a model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.data.features.feature_map import FeatureMap
from trainer.data.format.history import HistorySlice
from trainer.runtime.host_copy import to_device

CHUNK_ENTRIES = 1 << 20
"""Number of entries that are written or moved at a time."""


class DeviceEntries:
    """Entries of histories on a device, each at a place that the caller chooses.

    Args:
        features: feature map of the model.
        size: number of places.
        device: device of the columns.

    Attributes:
        ids: ``item`` and ``author`` -> ids of the entries in these tables, ``[size]``: int64 of dynamic tables, which
            are any numbers, and int32 rows of the others.
        context: ``[size, context ids]`` int32, ids in the table ``side``, those of an age of 0.
        request_ms: ``[size]`` int64, start of each visit.
        has_beyond: True if a direct id beyond its table was written.
    """

    def __init__(self, features: FeatureMap, size: int, device: torch.device) -> None:
        self._features, self._device = features, device
        self.ids = {
            name: torch.zeros(size, dtype=_id_type(features, name), device=device) for name in ("item", "author")
        }
        self.context = torch.zeros(size, features.context_ids, dtype=torch.int32, device=device)
        self.request_ms = torch.zeros(size, dtype=torch.int64, device=device)
        self.has_beyond = False

    def write(self, places: np.ndarray, visits: HistorySlice) -> None:
        """Write entries, on the current stream; the host waits for nothing.

        Args:
            places: ``[n]`` int64, different places.
            visits: n entries.

        Raises:
            UserError: a direct id is negative.
        """
        rows = self._features.entry_rows(visits)
        at = to_device(torch.from_numpy(places), self._device)
        parts = (self.ids["item"], rows.item), (self.ids["author"], rows.author)
        for column, values in (*parts, (self.context, rows.context), (self.request_ms, visits.request_ms)):
            column.index_copy_(0, at, to_device(torch.from_numpy(np.asarray(values)).to(column.dtype), self._device))
        self.has_beyond = self.has_beyond or rows.beyond > 0

    def move(self, size: int, moves: np.ndarray, *, afresh: bool) -> None:
        """Move runs of entries to other places, on the current stream; the host waits for nothing.

        Args:
            size: number of places from now on; not less than before, unless ``afresh``.
            moves: ``[3, runs]`` int64: first place of each run, the place to move it to, and its number of entries. The
                places to move to hold nothing that is needed.
            afresh: begin with empty columns, to which all entries that are needed move.
        """
        parts = [(total, to_device(torch.from_numpy(part), self._device)) for total, part in _parts(moves)]
        for name in self.ids:
            self.ids[name] = _moved(self.ids[name], size, parts, afresh)
        self.context = _moved(self.context, size, parts, afresh)
        self.request_ms = _moved(self.request_ms, size, parts, afresh)


def entry_bytes(features: FeatureMap) -> int:
    """Return the bytes of memory that an entry of the histories takes on the device."""
    ids = sum(_id_type(features, name).itemsize for name in ("item", "author"))
    return ids + torch.int64.itemsize + torch.int32.itemsize * features.context_ids


def _parts(moves: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the moves of a bounded number of entries at a time, with that number."""
    ends = np.cumsum(moves[2])
    cuts = np.flatnonzero(np.diff(ends // CHUNK_ENTRIES)) + 1
    for part in np.split(moves, cuts, axis=1) if len(ends) else ():
        yield int(part[2].sum()), np.ascontiguousarray(part)


def _moved(column: Tensor, size: int, parts: list[tuple[int, Tensor]], afresh: bool) -> Tensor:
    """Return a column of ``size`` places after moves of runs; see :meth:`DeviceEntries.move`."""
    target = column
    if afresh or size > len(column):
        # One column at a time: only two copies of it are in memory.
        target = column.new_zeros(size, *column.shape[1:])
        if not afresh:
            target[: len(column)] = column
    for total, (source, to, lengths) in parts:
        run = torch.repeat_interleave(lengths, output_size=total)
        within = torch.arange(total, device=column.device) - (lengths.cumsum(0) - lengths)[run]
        target.index_copy_(0, to[run] + within, column[source[run] + within])
    return target


def _id_type(features: FeatureMap, name: str) -> torch.dtype:
    """Return the type of a column of ids."""
    return torch.int64 if name in features.dynamic else torch.int32
