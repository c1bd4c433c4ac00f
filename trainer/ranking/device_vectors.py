"""Pre-trained vectors of the entries of histories, found on the device that makes the searches.

A batch brings each of its vectors once, in the order in which ids first need them. The loader knows only those of the
candidates, so the device numbers the vectors of a batch anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from modules.content import BatchVectors
from trainer.data.features.content_inputs import OwnerVectors, SegmentReadings
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.packed_batch import ContentLayout
from trainer.data.loading.late_vectors import LateVectors
from trainer.ranking.device_segments import VISIT_BYTES, DeviceSegments
from trainer.runtime.host_copy import to_device

ROW_BYTES = 4
"""Bytes of the row of a visit in a table of vectors of items or of authors."""

_ROWS_AT_ONCE = 1 << 16


class DeviceVectors:
    """Vectors of one table for the entries of a rank's histories.

    Args:
        layout: layout of the vectors in a batch.
        reader: vectors of the entries.
        places: places of the entries on the device.
        device: device of the rank.

    Attributes:
        name: name of the table.
    """

    def __init__(
        self, layout: ContentLayout, reader: OwnerVectors | SegmentReadings, places: DevicePlaces, device: torch.device
    ) -> None:
        self.name, self._layout = layout.name, layout
        self._on_air, self._rows = None, torch.empty(0, dtype=torch.int32, device=device)
        if isinstance(reader, SegmentReadings):
            self._on_air = DeviceSegments(places, reader.entry_changes, device)
        else:
            rows = [reader.entry_rows(visits).astype(np.int32) for visits in places.read()]
            self._rows = to_device(torch.from_numpy(np.concatenate([np.empty(0, np.int32), *rows])), device)
        vectors = reader.vectors
        self._table = torch.empty(vectors.shape, dtype=getattr(torch, vectors.dtype.name), device=device)
        for begin in range(0, len(vectors), _ROWS_AT_ONCE):
            # A copy: the table is a file that cannot be written.
            part = torch.from_numpy(np.array(vectors[begin : begin + _ROWS_AT_ONCE]))
            self._table[begin : begin + len(part)] = part.to(device)

    @staticmethod
    def bytes_needed(entries: int, vectors: int, vector_bytes: int, *, of_segments: bool) -> int:
        """Return the bytes of memory that the vectors take on the device.

        Args:
            entries: number of entries on the device.
            vectors: number of vectors of the table.
            vector_bytes: bytes of a vector.
            of_segments: the vectors are those of segments, and the segment of each visit changes once.
        """
        return entries * (VISIT_BYTES if of_segments else ROW_BYTES) + vectors * vector_bytes

    def keys(self, at: Tensor, as_of_ms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row in the table of each entry's vector, ``[entries]`` int64, -1 without one.

        Args:
            at: ``[entries]`` int64, places on the device.
            as_of_ms: ``[entries]`` int64, time of each entry's row.

        Returns:
            The rows, and ``[2]`` int64: number of entries without a vector, and of all that can have one.
        """
        if self._on_air is not None:
            found, live = self._on_air.read(at, as_of_ms)
            return found, torch.stack([((found < 0) & live).sum(), live.sum()])
        found = self._rows[at].long()
        return found, torch.stack([(found < 0).sum(), torch.ones_like(found).sum()])

    def of_batch(self, known: BatchVectors, candidates: Tensor, entries: Mapping[str, Tensor]) -> LateVectors:
        """Return the vectors of a batch.

        Args:
            known: vectors of the candidates.
            candidates: ``[rows]`` int64, the key of each candidate's vector: its row in the table, or a number beyond
                it; -1 without a vector.
            entries: history -> rows of its entries in the table, ``[entries]`` int64, -1 without a vector.
        """
        keys, places, count = first_of_each(torch.cat([candidates, *entries.values()]))
        of_entries = places[len(candidates) :].split([len(found) for found in entries.values()])
        of_lookups = {f"{history}_{self.name}": found for history, found in zip(entries, of_entries, strict=True)}
        return LateVectors(known, keys, count, self._table, {self.name: known.places[self.name], **of_lookups})


def first_of_each(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number different keys in the order in which they first appear; the host waits for nothing.

    Args:
        keys: ``[n]`` int64; keys below 0 are left out.

    Returns:
        ``[n]`` int64, the different keys, of which the first ``count`` are used; ``[n]`` int64, the number of each key,
        -1 for a key below 0; and ``count``, scalar int64.
    """
    n, here = len(keys), torch.arange(len(keys), device=keys.device)
    ordered, order = keys.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    group = begins.cumsum(0) - 1
    # The sort is stable, so a group begins with its first appearance. All else is written behind the end.
    of_group = torch.zeros(n + 1, dtype=torch.int64, device=keys.device)
    of_group.scatter_(0, torch.where(begins, group, n), order)
    first = torch.empty_like(order).scatter_(0, order, of_group[group])
    counted = (first == here) & (keys >= 0)
    number = counted.cumsum(0) - 1
    distinct = torch.zeros(n + 1, dtype=torch.int64, device=keys.device)
    distinct.scatter_(0, torch.where(counted, number, n), keys)
    return distinct[:n], torch.where(keys >= 0, number[first], -1), counted.sum()
