"""Values of JSON documents that another version of the job may have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: object) -> float | None:
    """Return a number; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mapping(value: object) -> Mapping[str, Any]:
    """Return a JSON object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def numbers(value: object) -> list[float | None]:
    """Return the numbers of a JSON list, with None for other entries; an empty list for anything else."""
    return [number(entry) for entry in value] if isinstance(value, list) else []


def share_of(part: object, whole: object) -> float | None:
    """Return a part of a whole, if both are numbers and the whole is above 0."""
    numerator, denominator = number(part), number(whole)
    return numerator / denominator if numerator is not None and denominator else None


def whole(value: object) -> str:
    """Format a whole number; an empty text for anything else."""
    return f"{value:,}" if isinstance(value, int) else ""
