"""Sums along the metric history of a run."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.report.stored_run import Entry
from trainer.report.stored_values import number


def cumulated(history: Sequence[Entry], key: str) -> list[float]:
    """Return the sums of a key up to each entry."""
    sums, total = [], 0.0
    for entry in history:
        total += number(entry.get(key)) or 0.0
        sums.append(total)
    return sums


def seconds_until(history: Sequence[Entry]) -> list[float]:
    """Return the seconds of training up to each entry."""
    sums, total = [], 0.0
    for entry in history:
        rows, rate = number(entry.get("rows")) or 0.0, number(entry.get("rows_per_second")) or 0.0
        total += rows / rate if rate else number(entry.get("seconds")) or 0.0
        sums.append(total)
    return sums


def training_seconds(history: Sequence[Entry]) -> float:
    """Return the seconds of training of a history."""
    return (seconds_until(history) or [0.0])[-1]
