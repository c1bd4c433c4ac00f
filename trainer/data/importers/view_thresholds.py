"""When watching counts as an effective and as a long view, for logs that tell only how long somebody watched.

No source publishes the thresholds of its platform for live rooms; these are Limelight's own and stated in
``dataset.json``. For videos they are those of KuaiRand's ``long_view`` and KuaiLive-M3's criterion of a positive play.
"""

from __future__ import annotations

import numpy as np

LIVE_EFFECTIVE_MS, LIVE_LONG_MS = 15_000, 60_000
"""Time in a live room."""

VIDEO_EFFECTIVE_SHARE, VIDEO_LONG_MS = 0.1, 18_000
"""Share of a video, and the time that is long however long the video is; all of a shorter video is long too."""

FACTS = {
    "live_effective_view_ms": LIVE_EFFECTIVE_MS,
    "live_long_view_ms": LIVE_LONG_MS,
    "video_effective_view_share": VIDEO_EFFECTIVE_SHARE,
    "video_long_view_ms": VIDEO_LONG_MS,
}


def live_view_delays(play_ms: np.ndarray) -> dict[str, np.ndarray]:
    """``delay_effective_view`` and ``delay_long_view`` of live visits, ``[n] int32``: when reached, -1 for never."""
    thresholds = {"effective_view": LIVE_EFFECTIVE_MS, "long_view": LIVE_LONG_MS}
    return {
        f"delay_{name}": np.where(play_ms >= threshold, threshold, -1).astype(np.int32)
        for name, threshold in thresholds.items()
    }


def video_view_delays(play_ms: np.ndarray, duration_ms: np.ndarray, complete: np.ndarray) -> dict[str, np.ndarray]:
    """The same for videos.

    Args:
        play_ms: ``[n]`` time watched, below 2^31.
        duration_ms: ``[n]``, 0 where it is not known: such a video counts as seen only where ``complete`` says so.
        complete: ``[n] bool``, the video was seen to its end.
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
