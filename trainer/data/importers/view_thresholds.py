"""Thresholds of effective and long views, for logs that record only the time watched.

No source publishes the thresholds of its platform for live rooms, so these are Limelight's own; ``dataset.json`` states
them. The thresholds of videos are those of KuaiRand's ``long_view`` and KuaiLive-M3's criterion of a positive play.
"""

from __future__ import annotations

import numpy as np

LIVE_EFFECTIVE_MS, LIVE_LONG_MS = 15_000, 60_000
"""Thresholds of the time watched in a live room."""

VIDEO_EFFECTIVE_SHARE, VIDEO_LONG_MS = 0.1, 18_000
"""Thresholds of a video: share of its length for an effective view, time for a long view. Watching all of a shorter
video is a long view, too."""

FACTS = {
    "live_effective_view_ms": LIVE_EFFECTIVE_MS,
    "live_long_view_ms": LIVE_LONG_MS,
    "video_effective_view_share": VIDEO_EFFECTIVE_SHARE,
    "video_long_view_ms": VIDEO_LONG_MS,
}


def live_view_delays(play_ms: np.ndarray) -> dict[str, np.ndarray]:
    """Return ``delay_effective_view`` and ``delay_long_view`` of live visits, ``[n] int32``; -1 for no such view."""
    thresholds = {"effective_view": LIVE_EFFECTIVE_MS, "long_view": LIVE_LONG_MS}
    return {
        f"delay_{name}": np.where(play_ms >= threshold, threshold, -1).astype(np.int32)
        for name, threshold in thresholds.items()
    }


def video_view_delays(play_ms: np.ndarray, duration_ms: np.ndarray, complete: np.ndarray) -> dict[str, np.ndarray]:
    """Return ``delay_effective_view`` and ``delay_long_view`` of visits to videos, ``[n] int32``; -1 for no such view.

    Args:
        play_ms: ``[n]`` time watched, below 2^31.
        duration_ms: ``[n]`` length of the video, 0 if unknown; then only ``complete`` gives an effective view.
        complete: ``[n] bool``, True if the video was watched to its end.
    """
    unknown = duration_ms <= 0
    effective = np.where(unknown, play_ms, np.ceil(VIDEO_EFFECTIVE_SHARE * duration_ms))
    long = np.minimum(np.where(unknown, VIDEO_LONG_MS, duration_ms), VIDEO_LONG_MS)
    reached = {
        "effective_view": (complete | (~unknown & (play_ms >= effective)), effective),
        "long_view": (complete | (play_ms >= long), long),
    }
    return {
        f"delay_{name}": np.where(happened, np.minimum(threshold, play_ms), -1).astype(np.int32)
        for name, (happened, threshold) in reached.items()
    }
