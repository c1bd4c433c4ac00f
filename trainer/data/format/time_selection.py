"""Selection by time, and by domain, of the rows that a job reads."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from trainer.data.format.schema import DOMAINS, Rows
from trainer.data.format.shards import RecordIndex

_ALWAYS = np.iinfo(np.int64)


@dataclass(frozen=True)
class Selection:
    """Selects rows whose times of emission and request lie in half-open ranges, in milliseconds UTC; by default all.

    Training selects by emission, the moment from which a row may be trained on. Evaluation selects by request.
    ``domains`` has the names of the domains of the rows; empty for all.
    """

    emit_from: int = _ALWAYS.min
    emit_until: int = _ALWAYS.max
    request_from: int = _ALWAYS.min
    request_until: int = _ALWAYS.max
    domains: tuple[str, ...] = ()

    def touches(self, index: RecordIndex) -> np.ndarray:
        """Return a mask of the records that may contain a selected row, ``[records] bool``."""
        return (
            (index.emit_max >= self.emit_from)
            & (index.emit_min < self.emit_until)
            & (index.request_max >= self.request_from)
            & (index.request_min < self.request_until)
        )

    def covers(self, index: RecordIndex) -> np.ndarray:
        """Return a mask of the records whose rows are all selected, ``[records] bool``."""
        # The index does not know the domains of the rows.
        return (
            np.full(len(index.emit_min), not self.domains)
            & (index.emit_min >= self.emit_from)
            & (index.emit_max < self.emit_until)
            & (index.request_min >= self.request_from)
            & (index.request_max < self.request_until)
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the rows that :meth:`mask` reads."""
        return ("emit_ms", "request_ms", *(["domain"] if self.domains else []))

    def mask(self, rows: Rows) -> np.ndarray:
        """Return a mask of the selected rows, ``[n] bool``."""
        emit, request = rows["emit_ms"], rows["request_ms"]
        within = (
            (emit >= self.emit_from)
            & (emit < self.emit_until)
            & (request >= self.request_from)
            & (request < self.request_until)
        )
        if self.domains:
            within &= np.isin(rows["domain"], [DOMAINS.index(name) for name in self.domains])
        return within

    def __str__(self) -> str:
        """Describe the bounds that are set, as UTC times, and the domains."""
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
        return " and ".join(sides or ["at any time"]) + (f", of {', '.join(self.domains)}" if self.domains else "")


def _utc(time_ms: int) -> str:
    """Return an ISO time, or the number of milliseconds if it lies outside the calendar."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"
