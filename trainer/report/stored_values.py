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


def whole(value: object) -> str:
    """Format a whole number; an empty text for anything else."""
    return f"{value:,}" if isinstance(value, int) else ""
