"""Slices of one rank: which batches are in a slice, and until when all events are known after it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.stream.sources.time_slices import TimeSlices

SLICE_MS = 100


class Batch:
    """Batch of one partition, whose latest event has a time."""

    def __init__(self, latest_ms: int, events: int = 1) -> None:
        self.position = {0: [latest_ms, 0, latest_ms, 0]}
        self._events = events

    def __len__(self) -> int:
        return self._events


class Reader:
    """Reader that has some batches now; afterwards it has ended, or waits for more."""

    def __init__(self, batches: list[Batch], ends: bool) -> None:
        self.position: dict[int, list[int]] = {}
        self._batches, self._ends = batches, ends

    @property
    def finished(self) -> bool:
        return self._ends and not self._batches

    def take(self, wait: float | None) -> Batch | None:
        return self._batches.pop(0) if self._batches else None


@pytest.mark.parametrize(("ends", "last_ms"), [(True, 500), (False, 470)])
def test_a_slice_is_complete_if_the_next_event_is_in_a_later_one(ends: bool, last_ms: int) -> None:
    batches = [Batch(110), Batch(130), Batch(199), Batch(200), Batch(205, events=0), Batch(470)]
    reader: Any = Reader(list(batches), ends)
    unused: Any = None
    slices = TimeSlices(reader, unused, SLICE_MS, 0.0)
    slices._look_ahead()
    assert slices.take(0) == []
    # All events before the first one are known.
    assert slices.seen_until_ms(0) == 100
    assert slices.take(1) == batches[:3] and slices.position == batches[2].position
    assert slices.seen_until_ms(1) == 200
    assert slices.take(2) == batches[3:4] and slices.position == batches[4].position
    assert slices.seen_until_ms(2) == 300 and slices.seen_until_ms(3) == 400
    # The next event is in this slice: it is not complete.
    assert slices.seen_until_ms(4) == 200
    assert slices.take(4) == batches[5:] and slices.position == batches[5].position
    assert slices.seen_until_ms(4) == last_ms
