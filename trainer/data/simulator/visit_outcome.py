"""What comes of an exposure: which behaviours, after how long, and when the visit ends.

Table 1 of Moment&Cross holds by construction. A first behaviour is either early (seen 5 minutes after the request) or
late (seen after 5 minutes and within the hour). It can only be late in a live room that stays open, in a visit that
went on to a long view, after a click. ``LateShare`` spreads the lateness that the table demands of all behaviours
over those visits that can bear it, from the true probabilities, so the expected shares are those of the table. Lateness
is drawn after what happened and changes no probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import CLICK, EFFECTIVE_VIEW, INTERACTIONS, LONG_VIEW, Chances
from trainer.data.simulator.config import BEHAVIOURS, HOUR_MS, MINUTE_MS, SECOND_MS

SEEN_AT_5_MINUTES: dict[str, float] = {"click": 0.96, "like": 0.79, "comment": 0.78, "gift": 0.68, "follow": 0.75}
"""Share of the positives within an hour that is seen at 5 minutes: Table 1 of M&C; follow is not in the table. The
views are thresholds on the time watched, so all of them are seen."""

LATE_BEHAVIOURS = [BEHAVIOURS.index(name) for name in SEEN_AT_5_MINUTES]
LATE_DEMAND = 1 - np.array(list(SEEN_AT_5_MINUTES.values()))
LATE_CEILING = 0.95
"""A roomy long visit's behaviour is late with at most this probability."""

FAST_MS, SLOW_MS = 5 * MINUTE_MS, HOUR_MS
ROOM_FOR_LATE_MS = 10 * MINUTE_MS
"""A late behaviour needs a room that stays open for at least so long."""

LIVE_EFFECTIVE_MS, LIVE_LONG_MS = 15 * SECOND_MS, 60 * SECOND_MS
VIDEO_EFFECTIVE_MS, VIDEO_LONG_MS = 7 * SECOND_MS, 18 * SECOND_MS
"""Time watched that makes an effective and a long view; of a video no more than half of it, and all of it."""
LIVE_BEYOND_MS, VIDEO_BEYOND = 100 * SECOND_MS, 0.6
"""Median time watched beyond a long view: milliseconds of a room, multiples of the long view of a video."""
VIDEO_LOOPS = 3
"""A video is watched at most so many times over."""


@dataclass(frozen=True)
class Clock:
    """Thresholds of ``n`` visits in milliseconds, float64.

    Attributes:
        effective: time watched that is an effective view.
        long: time watched that is a long view.
        limit: until the room closes, or the video has been seen ``VIDEO_LOOPS`` times.
    """

    effective: np.ndarray
    long: np.ndarray
    limit: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """``delay [behaviours, n] int32``: from request to the first behaviour, -1 if none; ``play_ms [n] int64``."""

    delay: np.ndarray
    play_ms: np.ndarray


class LateShare:
    """Keeps the expected share of late behaviours at one minus ``SEEN_AT_5_MINUTES``.

    What the visits of one call cannot bear is owed to the next ones.
    """

    def __init__(self) -> None:
        self.owed = np.zeros(len(LATE_BEHAVIOURS))

    def draw(self, chances: Chances, live: np.ndarray, roomy: np.ndarray) -> np.ndarray:
        """Probability that a behaviour of a roomy long visit is late.

        Args:
            chances: of the visits.
            live: positions of the live visits; videos have no part in the table.
            roomy: positions of those that can bear a late behaviour.

        Returns:
            ``[5] float64`` for click, like, comment, gift and follow; never less than for click, because a late
            click makes all that follows it late.
        """
        self.owed += LATE_DEMAND * chances.marginal[:, live].sum(axis=1, dtype=np.float64)[LATE_BEHAVIOURS]
        capacity = chances.marginal_long[:, roomy].sum(axis=1, dtype=np.float64)[LATE_BEHAVIOURS]
        late = np.minimum(self.owed / np.maximum(capacity, 1e-9), LATE_CEILING)
        late = np.maximum(late, late[0])
        self.owed -= late * capacity
        return late


def clock(live: np.ndarray, left_ms: np.ndarray) -> Clock:
    """Thresholds of visits. ``left_ms [n]``: until a room closes; the length of a video."""
    left = left_ms.astype(np.float64)
    return Clock(
        effective=np.where(live, LIVE_EFFECTIVE_MS, np.minimum(VIDEO_EFFECTIVE_MS, np.floor(left / 2))),
        long=np.where(live, LIVE_LONG_MS, np.minimum(VIDEO_LONG_MS, left)),
        limit=np.where(live, left, VIDEO_LOOPS * left),
    )


def draw_outcome(
    rng: np.random.Generator, chances: Chances, clock: Clock, live: np.ndarray, late_share: LateShare
) -> Outcome:
    """Draw what happens in ``n`` visits.

    Args:
        rng: random stream.
        chances: true probabilities.
        clock: thresholds.
        live: ``[n] bool``.
        late_share: carried over the calls of a world.
    """
    n = len(live)
    uniform = rng.random((19, n), np.float32)
    clicked = uniform[0] < chances.click
    effective = uniform[1] < np.where(clicked, chances.effective[1], chances.effective[0])
    long = effective & (uniform[2] < np.where(clicked, chances.long[1], chances.long[0]))
    shallow, halfway, deep = chances.interaction
    acted = clicked & (uniform[3:7] < np.where(long, deep, np.where(effective, halfway, shallow)))

    low, high = np.where(effective, clock.effective, 0), np.where(effective, clock.long, clock.effective)
    median_beyond = np.where(live, LIVE_BEYOND_MS, VIDEO_BEYOND * clock.long)
    beyond = median_beyond * np.exp(1.2 * rng.standard_normal(n, np.float32))
    play = np.minimum(np.where(long, clock.long + beyond, low + uniform[7] * (high - low)), clock.limit)

    on_air = np.flatnonzero(live)
    roomy = on_air[clock.limit[on_air] >= ROOM_FOR_LATE_MS]
    late = late_share.draw(chances, on_air, roomy)
    may_be_late = roomy[clicked[roomy] & long[roomy]]
    click_late = uniform[8, may_be_late] < late[0]
    rest_late = click_late | (uniform[9:13, may_be_late] < ((late[1:] - late[0]) / (1 - late[0]))[:, None])

    fast_end = np.minimum(play, FAST_MS)
    slow_end = np.minimum(clock.limit, SLOW_MS)
    click_at = fast_end * uniform[13] ** 4
    at = may_be_late[click_late]
    click_at[at] = _between(FAST_MS + 1, slow_end[at], uniform[13, at])
    rest_at = click_at + (fast_end - click_at) * uniform[14:18]
    which, place = np.nonzero(rest_late)
    at = may_be_late[place]
    rest_at[which, at] = _between(np.maximum(click_at[at], FAST_MS + 1), slow_end[at], uniform[14 + which, at])

    delay = np.empty((len(BEHAVIOURS), n), np.int32)
    delay[CLICK] = np.where(clicked, click_at, -1)
    delay[EFFECTIVE_VIEW] = np.where(effective, clock.effective, -1)
    delay[LONG_VIEW] = np.where(long, clock.long, -1)
    delay[INTERACTIONS] = np.where(acted, rest_at, -1)
    # who has acted stays a little, but not into another kind of view and not beyond the end
    last = delay.max(axis=0)
    stay = np.where(long, clock.limit, high - 1)
    lingering = np.minimum(last + SECOND_MS * (1 + 60 * uniform[18].astype(np.float64)), stay)
    play = np.where(clicked & (last >= play - SECOND_MS), lingering, play)
    return Outcome(delay, np.floor(play).astype(np.int64))


def _between(low: np.ndarray | float, high: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Log-uniform between two times: most of what is late is not very late."""
    return low * (high / low) ** uniform.astype(np.float64)
