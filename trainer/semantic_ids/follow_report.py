"""Reports of a job that follows live rooms: counts, and the distribution of the lag."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError
from trainer.runtime.scalars import open_scalars

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
COUNTS = {
    "embedded": "segments embedded",
    "repeated": "repeated",
    "late": "too late",
    "dropped": "dropped",
    "empty": "empty",
    "rejected": "rejected",
    "conflicting": "in conflict with the store",
}
"""Counts of segments, and their words in a line."""


def lag_quantiles(lags: Sequence[float]) -> dict[str, float]:
    """Return quantiles of lags in seconds: p50, p90, p99 and the maximum, each the lag of a segment.

    Args:
        lags: at least one.
    """
    ordered = np.sort(np.array(lags))
    return {name: float(ordered[max(0, int(np.ceil(q * len(ordered))) - 1)]) for name, q in QUANTILES.items()}


class FollowReport:
    """Writes a report from time to time: a line of the log, ``metrics.jsonl``, and TensorBoard's scalars.

    Args:
        directory: directory of the job.
        every_seconds: time between two reports.
        now: time by a clock that is never set.
        embedded: number of segments that were embedded by earlier processes, the step of the scalars.
    """

    def __init__(self, directory: Path, every_seconds: float, now: float, embedded: int) -> None:
        self._file, self._every = directory / METRICS, every_seconds
        self._began, self._embedded = now, embedded
        self._lags: list[float] = []
        self._counts: Counter[str] = Counter()
        self._rooms: set[int] = set()
        self._scalars = open_scalars(directory / "tensorboard", embedded)

    def add(self, counts: Mapping[str, int], lags: Sequence[float], rooms: Sequence[int]) -> None:
        """Count what was stored.

        Args:
            counts: numbers by the names of ``COUNTS``.
            lags: seconds from ``known_ms`` to the moment when the segment was stored.
            rooms: rooms of the segments.
        """
        self._counts.update(counts)
        self._embedded += counts.get("embedded", 0)
        self._lags += lags
        self._rooms.update(rooms)

    def is_due(self, now: float) -> bool:
        """True if the time between two reports has passed."""
        return now - self._began >= self._every

    def write(self, now: float, needed: float, reached: float, halved: bool) -> None:
        """Write a report of the time since the last one; nothing if nothing has happened.

        Args:
            now: time by a clock that is never set.
            needed: segments that become known a second.
            reached: segments stored a second of work.
            halved: True if only every second segment is taken.

        Raises:
            UserError: it cannot be written, such as on a full disk.
        """
        seconds, counts = now - self._began, self._counts
        self._began = now
        if not sum(counts.values()):
            return
        entry: dict[str, Any] = {
            "time_ms": round(time.time() * 1000),
            "seconds": seconds,
            "rooms": len(self._rooms),
            "needed_per_second": needed,
            "reached_per_second": reached if np.isfinite(reached) else None,
            "halved": halved,
            **{name: counts[name] for name in COUNTS},
            "lag_seconds": lag_quantiles(self._lags) if self._lags else None,
        }
        words = [f"{counts[name]:,} {words}" for name, words in COUNTS.items() if counts[name] and name != "embedded"]
        line = f"follow: {counts['embedded']:,} segments of {len(self._rooms):,} rooms in {seconds:,.0f} s"
        if self._lags:
            lag = entry["lag_seconds"]
            line += ", lag " + ", ".join(f"{name} {lag[name]:,.2f} s" for name in QUANTILES)
            line += f"; {needed:,.1f} segments/s become known, the model reaches {reached:,.1f}"
        logger.info("; ".join([line, *words]))
        try:
            with open(self._file, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"{self._file}: cannot be written ({error.strerror})") from None
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "time_ms":
                self._scalars.add_scalar(f"follow/{name}", value, self._embedded)
        for name, value in (entry["lag_seconds"] or {}).items():
            self._scalars.add_scalar(f"follow/lag_{name}", value, self._embedded)
        self._scalars.flush()
        self._lags, self._counts, self._rooms = [], Counter(), set()

    def close(self) -> None:
        """Close the scalars."""
        self._scalars.close()
