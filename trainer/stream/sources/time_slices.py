"""Time slices: all ranks process a stream in the same slices of event time.

If one rank ran ahead, it would train the model on events that the other ranks have not reached, and their predictions
would know the future. So the ranks agree on the next slice, and each takes its own events of it. In a stream that is
read to its end, the content of a slice depends only on the log; a live stream is taken as it comes.
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
"""Slice number of a rank that has no event now."""


class SliceAgreement(NamedTuple):
    """Agreement of the ranks before a slice.

    Attributes:
        number: number of the slice; None if no rank has events now.
        finished: True if the stream of every rank has ended.
        values: ``[ranks, n]`` int64, the values that each rank sent.
    """

    number: int | None
    finished: bool
    values: np.ndarray


class TimeSlices:
    """Gives the events of a rank slice by slice. Only :meth:`agree` is collective.

    Args:
        reader: reader of this rank's partitions, opened with the same ``slice_ms``.
        world: ranks of the job.
        slice_ms: length of a slice in event time.
        wait_seconds: maximum time to wait for the next event; None waits until it comes or the stream ends.

    Attributes:
        position: position after the last batch taken.
    """

    def __init__(self, reader: StreamReader, world: World, slice_ms: int, wait_seconds: float | None) -> None:
        self._reader, self._world, self._slice_ms, self._wait = reader, world, slice_ms, wait_seconds
        self.position: Position = reader.position
        self._ahead: EventBatch | None = None
        self._now_ms = 0

    def agree(self, values: tuple[int, ...]) -> SliceAgreement:
        """Agree with all ranks on the next slice, and exchange ``values`` with them. Collective.

        Raises:
            UserError: the stream cannot be read any further.
        """
        self._look_ahead()
        # One message carries the slice number and all values.
        local = torch.tensor([self._next, *values], dtype=torch.int64)
        gathered = [torch.empty_like(local) for _ in range(self._world.size)]
        dist.all_gather(gathered, local, group=self._world.control)
        table = torch.stack(gathered).numpy()
        # The earliest slice of any rank comes next; END_OF_TIME is the minimum only if all streams have ended.
        number = int(table[:, 0].min())
        return SliceAgreement(number if number < _NOTHING_NOW else None, number == END_OF_TIME, table[:, 1:])

    def take(self, number: int) -> list[EventBatch]:
        """Return this rank's batches of a slice.

        Raises:
            UserError: the stream cannot be read any further.
        """
        batches = []
        while self._ahead is not None and self._next == number:
            batches.append(self._ahead)
            self.position = self._ahead.position
            self._now_ms = _latest_ms(self._ahead)
            self._ahead = None
            self._look_ahead()
        return batches

    def seen_until_ms(self, number: int) -> int:
        """Return the event time before which, after a slice, all known events of this rank have been taken."""
        # The next event is in a later slice, so this slice is complete.
        if self._next > number and self._next != _NOTHING_NOW:
            return (number + 1) * self._slice_ms
        return self._now_ms

    @property
    def _next(self) -> int:
        """Slice number of the next event."""
        if self._ahead is not None:
            return _latest_ms(self._ahead) // self._slice_ms
        return END_OF_TIME if self._reader.finished else _NOTHING_NOW

    def _look_ahead(self) -> None:
        """Read the next batch, unless there is one."""
        while self._ahead is None and not self._reader.finished:
            batch = self._reader.take(self._wait)
            if batch is None:
                return
            if len(batch):
                self._ahead = batch
            else:
                # All messages were rejected, but the position must pass them.
                self.position = batch.position


def _latest_ms(batch: EventBatch) -> int:
    """Return the merged event time after a batch: the latest time of any partition so far."""
    return max(latest_ms for _, _, latest_ms, _ in batch.position.values())
