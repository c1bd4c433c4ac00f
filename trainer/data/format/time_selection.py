"""Which rows of a dataset a job reads, by time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from trainer.data.format.schema import Rows
from trainer.data.format.shards import RecordIndex

_ALWAYS = np.iinfo(np.int64)


@dataclass(frozen=True)
class Selection:
    """Rows emitted and requested inside half-open ranges, milliseconds UTC; without arguments, all rows.

    Training selects by emission, the moment at which a row may first be trained on; evaluation by request.
    """

    emit_from: int = _ALWAYS.min
    emit_until: int = _ALWAYS.max
    request_from: int = _ALWAYS.min
    request_until: int = _ALWAYS.max

    def touches(self, index: RecordIndex) -> np.ndarray:
        """Which records may have a selected row, ``[records] bool``."""
        return (
            (index.emit_max >= self.emit_from)
            & (index.emit_min < self.emit_until)
            & (index.request_max >= self.request_from)
            & (index.request_min < self.request_until)
        )

    def covers(self, index: RecordIndex) -> np.ndarray:
        """Which records have no row that is not selected, ``[records] bool``."""
        return (
            (index.emit_min >= self.emit_from)
            & (index.emit_max < self.emit_until)
            & (index.request_min >= self.request_from)
            & (index.request_max < self.request_until)
        )

    def mask(self, rows: Rows) -> np.ndarray:
        """Which rows are selected, ``[n] bool``."""
        emit, request = rows["emit_ms"], rows["request_ms"]
        return (
            (emit >= self.emit_from)
            & (emit < self.emit_until)
            & (request >= self.request_from)
            & (request < self.request_until)
        )

    def __str__(self) -> str:
        """The bounded sides, as UTC times."""
        sides = [
            f"{verb} {word} {_utc(time)}"
            for verb, word, time, open_end in (
                ("emitted", "from", self.emit_from, _ALWAYS.min),
                ("emitted", "before", self.emit_until, _ALWAYS.max),
                ("requested", "from", self.request_from, _ALWAYS.min),
                ("requested", "before", self.request_until, _ALWAYS.max),
            )
            if time != open_end
        ]
        return " and ".join(sides) or "at any time"


def _utc(time_ms: int) -> str:
    """ISO time, or the number where it lies outside the calendar."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"
