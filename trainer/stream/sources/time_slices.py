"""All ranks go through a stream in slices of event time, side by side.

A rank that ran ahead would train the model on what others have not come to yet, and their predictions would know of it.
So the ranks agree on the slice that comes next, and each takes its own events of it. Of a stream that is read to its
end, what is in a slice depends on the log alone; a live one is taken as it comes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from trainer.runtime.distributed import World
from trainer.stream.labels.assembled_rows import END_OF_TIME
from trainer.stream.sources.source import EventBatch, Position, StreamReader

_NOTHING_NOW = END_OF_TIME - 1
"""Slice of a rank to which no event has come."""


class SliceAgreement(NamedTuple):
    """What the ranks have told each other before a slice.

    Attributes:
        number: of the slice; None where no rank has events now.
        finished: the stream of every rank has ended.
        values: ``[ranks, n]`` int64, the values that each rank sent.
    """

    number: int | None
    finished: bool
    values: np.ndarray


class TimeSlices:
    """The events of a rank by slices that all ranks share. All methods but :attr:`position` are collective.

    Args:
        reader: of this rank's partitions, opened with the same ``slice_ms``.
        world: the ranks.
        slice_ms: length of a slice in event time.
        wait_seconds: how long to wait for events that may not come; None waits until they do, or the stream ends.

    Attributes:
        position: after the last batch that was handed out.
    """

    def __init__(self, reader: StreamReader, world: World, slice_ms: int, wait_seconds: float | None) -> None:
        self._reader, self._world, self._slice_ms, self._wait = reader, world, slice_ms, wait_seconds
        self.position: Position = reader.position
        self._ahead: EventBatch | None = None
        self._now_ms = 0

    def agree(self, told: tuple[int, ...]) -> SliceAgreement:
        """Which slice comes next, and what every rank tells the others on the way.

        Raises:
            UserError: why the stream cannot be read on.
        """
        self._look()
        mine = torch.tensor([self._next, *told], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self._world.size)]
        dist.all_gather(everyone, mine, group=self._world.control)
        table = torch.stack(everyone).numpy()
        number = int(table[:, 0].min())
        return SliceAgreement(number if number < _NOTHING_NOW else None, number == END_OF_TIME, table[:, 1:])

    def take(self, number: int) -> list[EventBatch]:
        """This rank's batches of a slice; not collective.

        Raises:
            UserError: why the stream cannot be read on.
        """
        batches = []
        while self._ahead is not None and self._next == number:
            batches.append(self._ahead)
            self.position = self._ahead.position
            self._now_ms = _latest_ms(self._ahead)
            self._ahead = None
            self._look()
        return batches

    def seen_until_ms(self, number: int) -> int:
        """All events of this rank before this time have been handed out, as far as can be known after a slice."""
        if self._next > number and self._next != _NOTHING_NOW:
            return (number + 1) * self._slice_ms
        return self._now_ms

    @property
    def _next(self) -> int:
        """Slice of the next event."""
        if self._ahead is not None:
            return _latest_ms(self._ahead) // self._slice_ms
        return END_OF_TIME if self._reader.finished else _NOTHING_NOW

    def _look(self) -> None:
        while self._ahead is None and not self._reader.finished:
            batch = self._reader.take(self._wait)
            if batch is None:
                return
            if len(batch):
                self._ahead = batch
            else:
                # All that came was rejected.
                self.position = batch.position


def _latest_ms(batch: EventBatch) -> int:
    """Where a batch of merged partitions has come to: the latest time of any of them so far."""
    return max(latest_ms for _, _, latest_ms, _ in batch.position.values())
