"""Local time in Shanghai: eight hours ahead of UTC, without summer time since 1991."""

from __future__ import annotations

import numpy as np

TIMEZONE = "Asia/Shanghai"
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


def local_ms(time_ms: np.ndarray) -> np.ndarray:
    """Convert milliseconds UTC to milliseconds of the local clock, ``[n] int64``."""
    return time_ms + 8 * HOUR_MS


def local_day(time_ms: np.ndarray) -> np.ndarray:
    """Return days since 1 January 1970 by the local calendar, ``[n] int64``."""
    return local_ms(time_ms) // DAY_MS


def hour_code(time_ms: np.ndarray) -> np.ndarray:
    """Return the local hour as a side feature, ``[n] int32`` in 1..24."""
    return (local_ms(time_ms) // HOUR_MS % 24 + 1).astype(np.int32)


def weekday_code(time_ms: np.ndarray) -> np.ndarray:
    """Return the local weekday as a side feature, ``[n] int32``, 1 (Monday) to 7."""
    # 1 January 1970 was a Thursday
    return ((local_day(time_ms) + 3) % 7 + 1).astype(np.int32)


def log_seconds_since(start_ms: np.ndarray, now_ms: np.ndarray) -> np.ndarray:
    """Return ``log(1 + seconds)`` between ``start_ms`` and ``now_ms``, ``[n] float32``.

    A ``start_ms`` of -1 means unknown and gives 0.
    """
    age_ms = np.where(start_ms >= 0, np.maximum(now_ms - start_ms, 0), 0)
    return np.log1p(age_ms / 1_000).astype(np.float32)
