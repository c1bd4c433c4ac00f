"""Pace of a job that follows live rooms: all segments, or every second one if the model is too slow for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

SPACING_SECONDS = 30
"""Time between two segments of a room: at an even load, segments of this time are one of each room."""
WINDOW_SECONDS = 60
"""Two segments of each room, one of which is taken at half the pace."""
CAUGHT_UP = 0.25
"""Share of ``behind_seconds`` below which a job has caught up."""
SPARE = 0.45
"""Largest share of time at work on every second segment at which all segments are taken again: below one half, so that
the job does not change its mind at once."""


class PaceChange(NamedTuple):
    """A change of the pace.

    Attributes:
        halved: True if only every second segment is taken from now on.
        needed: segments that become known a second.
        reached: segments that the job stores a second of work.
    """

    halved: bool
    needed: float
    reached: float


class Pace:
    """Decides which segments are taken, by the rate that is needed and the rate that is reached.

    A job that is late and could keep up with the rooms on air only has to catch up, such as after a pause: it takes
    all segments. Times are of the caller's clock, so the same calls give the same decisions.

    Args:
        behind_seconds: lag from which a job is too late.

    Attributes:
        halved: True if only every second segment is taken: those with an even number in their room.
    """

    def __init__(self, behind_seconds: float) -> None:
        self.halved = False
        self._behind = behind_seconds
        self._window = max(behind_seconds, float(WINDOW_SECONDS))
        self._arrived: dict[int, int] = {}
        self._work: deque[tuple[float, float, int]] = deque()
        self._changed_at: float | None = None

    def takes(self, segment: int) -> bool:
        """True if the segment with this number in its room is taken."""
        return not self.halved or segment % 2 == 0

    def arrived(self, times_ms: Sequence[int]) -> None:
        """Count segments, taken or not, by the clock time at which they arrived."""
        for time_ms in times_ms:
            second = time_ms // 1000
            self._arrived[second] = self._arrived.get(second, 0) + 1
        if self._arrived:
            oldest = max(self._arrived) - WINDOW_SECONDS
            self._arrived = {second: count for second, count in self._arrived.items() if second > oldest}

    def worked(self, now: float, seconds: float, segments: int) -> None:
        """Count the time that segments have taken up to now."""
        self._work.append((now, seconds, segments))
        while self._work[0][0] <= now - self._window:
            self._work.popleft()

    @property
    def needed(self) -> float:
        """Segments that become known a second."""
        if not self._arrived:
            return 0.0
        span = max(self._arrived) - min(self._arrived) + SPACING_SECONDS
        return sum(self._arrived.values()) / min(span, WINDOW_SECONDS)

    @property
    def reached(self) -> float:
        """Segments that the job stores a second of work; infinite before the first."""
        seconds = sum(seconds for _, seconds, _ in self._work)
        return sum(segments for *_, segments in self._work) / seconds if seconds else float("inf")

    def update(self, now: float, lag_seconds: float) -> PaceChange | None:
        """Decide anew after a batch.

        Args:
            now: time by a clock that is never set.
            lag_seconds: largest lag of the batch.

        Returns:
            The change, or None.
        """
        self._changed_at = now if self._changed_at is None else self._changed_at
        change = None
        if not self.halved:
            if lag_seconds > self._behind and self.reached < self.needed:
                change = PaceChange(True, self.needed, self.reached)
        elif lag_seconds < CAUGHT_UP * self._behind and now - self._changed_at >= self._window:
            busy = sum(seconds for _, seconds, _ in self._work) / self._window
            if busy < SPARE:
                change = PaceChange(False, self.needed, self.reached)
        if change is not None:
            self.halved, self._changed_at = change.halved, now
        return change
