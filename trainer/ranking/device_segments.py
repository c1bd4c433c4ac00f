"""Segments that were on air in the visits of a device's histories, read as of the time of each row.

The segment of a visit depends on the time as of which it is read, since a segment gets known after it was watched. It
changes at few times, most often at none after the visit was known. So the device has these changes, and finds the
latest one before the time of a row; the host need not know which visits were found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.data.features.code_inputs import CodeReader
from trainer.data.features.code_sets import CodeSet
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.segment_index import NO_SEGMENT, SegmentChanges
from trainer.data.format.history import HistorySlice
from trainer.data.format.schema import DOMAINS
from trainer.runtime.host_copy import to_device

VISIT_BYTES = 8 + 1 + 8 + 4
"""Bytes of a visit on the device: where its changes are, its domain, and time and place of one change."""

_LIVE = DOMAINS.index("live")


class DeviceSegments:
    """Place of the segment that was on air in each entry of a rank's histories, for every time.

    Args:
        places: places of the entries on the device.
        changes: returns the changes of some visits from a time on, ``[visits]`` int64.
        device: device of the rank.
    """

    def __init__(
        self, places: DevicePlaces, changes: Callable[[HistorySlice, np.ndarray], SegmentChanges], device: torch.device
    ) -> None:
        counts, since_ms, segments, live = ([np.empty(0, dtype)] for dtype in (np.int64, np.int64, np.int32, np.bool_))
        for visits, known_ms in zip(places.read(), places.column("known_ms"), strict=True):
            # A row finds visits that were known before its time.
            of_visits = changes(visits, known_ms + 1)
            counts.append(of_visits.counts)
            since_ms.append(of_visits.since_ms)
            segments.append(of_visits.places.astype(np.int32))
            live.append(visits.domain == _LIVE)
        # Places behind the last change are read, and not used.
        since_ms.append(np.zeros(1, np.int64))
        segments.append(np.full(1, NO_SEGMENT, np.int32))
        of_each = np.concatenate(counts)
        self._most = int(of_each.max(initial=0))
        self._edges, self._since_ms, self._segments, self._live = (
            to_device(torch.from_numpy(column), device)
            for column in (np.append(0, of_each.cumsum()), *map(np.concatenate, (since_ms, segments, live)))
        )

    def read(self, at: Tensor, as_of_ms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place of the segment of each entry, -1 without one, and which entries are visits to live rooms.

        Args:
            at: ``[entries]`` int64, places on the device.
            as_of_ms: ``[entries]`` int64, time of each entry's row.
        """
        first, stop = self._edges[at], self._edges[at + 1]
        low, high = first, stop
        for _ in range(self._most.bit_length()):
            middle = (low + high) >> 1
            known = (self._since_ms[middle] <= as_of_ms) & (low < high)
            low, high = torch.where(known, middle + 1, low), torch.where(known, high, middle)
        segment = self._segments[(low - 1).clamp(min=0)].long()
        return torch.where(low > first, segment, NO_SEGMENT), self._live[at]


class DeviceCodes:
    """Codes of the entries of a rank's histories on its device.

    Args:
        code_set: tables of the codes.
        reader: the codes.
        places: places of the entries on the device.
        device: device of the rank.
    """

    def __init__(self, code_set: CodeSet, reader: CodeReader, places: DevicePlaces, device: torch.device) -> None:
        self._on_air = DeviceSegments(places, reader.entry_changes, device)
        self._rows = {
            table.name: to_device(torch.from_numpy(rows), device)
            for table, rows in zip(code_set.tables, reader.rows_of_places(), strict=True)
        }

    @staticmethod
    def bytes_needed(code_set: CodeSet, segments: int, entries: int) -> int:
        """Return the bytes of memory that codes take on the device, if the code of each visit changes once.

        Args:
            code_set: tables of the codes.
            segments: number of segments with codes.
            entries: number of entries on the device.
        """
        return entries * VISIT_BYTES + len(code_set.tables) * (segments + 1) * np.dtype(np.int32).itemsize

    def fill(self, history: str, at: Tensor, as_of_ms: Tensor, ids: dict[str, Tensor]) -> Tensor:
        """Write the ids of some entries in the tables of the codes.

        Args:
            history: name of their history.
            at: ``[entries]`` int64, places on the device.
            as_of_ms: ``[entries]`` int64, time of each entry's row.
            ids: lookup -> its ids; written.

        Returns:
            ``[2]`` int64: number of visits to live rooms without a code, and of all visits to live rooms.
        """
        segment, live = self._on_air.read(at, as_of_ms)
        # Place -1, no segment, is the last one.
        found = {table: rows[segment] for table, rows in self._rows.items()}
        for table, rows in found.items():
            ids[f"{history}_{table}"].copy_(rows)
        first = next(iter(found.values()))
        return torch.stack([((first == 0) & live).sum(), live.sum()])
