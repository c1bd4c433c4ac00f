"""Formats tables, sizes, shapes and ages as plain text."""

from __future__ import annotations

from collections.abc import Sequence

_TIME_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000))


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Format lines as columns under a header; the first ``texts`` columns are aligned left, the others right."""
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )


def size_text(bytes_: int) -> str:
    """Format a size in the largest unit that it reaches, such as ``1.2 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= size:
            return f"{bytes_ / size:,.1f} {unit}"
    return f"{bytes_} B"


def shape_text(shape: Sequence[int]) -> str:
    """Format a shape, such as ``1,000 x 16``."""
    return " x ".join(f"{size:,}" for size in shape) if shape else "(a number)"


def age_text(age_ms: int) -> str:
    """Format an age in the largest unit that it reaches, such as ``3.2 h``."""
    for unit, size in _TIME_UNITS:
        if age_ms >= size:
            return f"{age_ms / size:.1f} {unit}"
    return "now"


def duration_text(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours, minutes and seconds, such as ``1:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
