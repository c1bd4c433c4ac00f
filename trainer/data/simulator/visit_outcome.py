"""Outcome of an exposure: the behaviours, their delays, and the time watched.

Table 1 of Moment&Cross holds by construction. A first behaviour is either early (within 5 minutes of the request) or
late (after 5 minutes and within the hour). It can be late only after a click, in a visit with a long view, in a live
room that stays open. ``LateShare`` computes from the true probabilities how often behaviours of such visits must be
late so that the expected shares over all visits are those of the table. Lateness is drawn after the behaviours
themselves and changes no probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import CLICK, EFFECTIVE_VIEW, INTERACTIONS, LONG_VIEW, BehaviourProbabilities
from trainer.data.simulator.config import BEHAVIOURS, HOUR_MS, MINUTE_MS, SECOND_MS

SEEN_AT_5_MINUTES: dict[str, float] = {"click": 0.96, "like": 0.79, "comment": 0.78, "gift": 0.68, "follow": 0.75}
"""Share of the positives within an hour that are seen at 5 minutes: Table 1 of Moment&Cross; that of follow is ours.

All effective and long views are seen by then, because they are thresholds on the time watched."""

LATE_BEHAVIOURS = [BEHAVIOURS.index(name) for name in SEEN_AT_5_MINUTES]
LATE_DEMAND = 1 - np.array(list(SEEN_AT_5_MINUTES.values()))
LATE_CEILING = 0.95
"""Highest probability that a behaviour of a visit is late, where the visit allows a late behaviour."""

FAST_MS, SLOW_MS = 5 * MINUTE_MS, HOUR_MS
ROOM_FOR_LATE_MS = 10 * MINUTE_MS
"""Shortest time that a room must stay open for a late behaviour."""

LIVE_EFFECTIVE_MS, LIVE_LONG_MS = 15 * SECOND_MS, 60 * SECOND_MS
VIDEO_EFFECTIVE_MS, VIDEO_LONG_MS = 7 * SECOND_MS, 18 * SECOND_MS
"""Time watched that counts as an effective and as a long view. For a short video the thresholds are lower: half of its
length and all of it."""
LIVE_BEYOND_MS, VIDEO_BEYOND = 100 * SECOND_MS, 0.6
"""Median time watched beyond a long view: in milliseconds for a room, in multiples of the long view for a video."""
VIDEO_LOOPS = 3
"""Most times that a video is watched in one visit."""


@dataclass(frozen=True)
class VisitThresholds:
    """Thresholds of ``n`` visits in milliseconds, float64.

    Attributes:
        effective: time watched that counts as an effective view.
        long: time watched that counts as a long view.
        limit: longest time watched: until the room closes, or ``VIDEO_LOOPS`` times the length of the video.
    """

    effective: np.ndarray
    long: np.ndarray
    limit: np.ndarray


@dataclass(frozen=True)
class VisitOutcome:
    """Delays and times watched of ``n`` visits, in milliseconds.

    Attributes:
        delay: ``[behaviours, n] int32``, from the request to the first behaviour, -1 if there is none.
        play_ms: ``[n] int64``, time watched.
    """

    delay: np.ndarray
    play_ms: np.ndarray


class LateShare:
    """Keeps the expected share of late behaviours at one minus ``SEEN_AT_5_MINUTES``.

    If the visits of one call allow too few late behaviours, the rest is carried over to the next calls.
    """

    def __init__(self) -> None:
        self.owed = np.zeros(len(LATE_BEHAVIOURS))

    def draw(self, probabilities: BehaviourProbabilities, live: np.ndarray, late_capable: np.ndarray) -> np.ndarray:
        """Return the probability that a behaviour of a clicked, long visit is late, where the room allows it.

        Args:
            probabilities: true probabilities of the visits.
            live: positions of the live visits; the table does not count videos.
            late_capable: positions of the live visits whose room stays open long enough for a late behaviour.

        Returns:
            ``[5] float64`` for click, like, comment, gift and follow. No value is below that of click, because every
            behaviour after a late click is late, too.
        """
        self.owed += LATE_DEMAND * probabilities.marginal[:, live].sum(axis=1, dtype=np.float64)[LATE_BEHAVIOURS]
        capacity = probabilities.marginal_long[:, late_capable].sum(axis=1, dtype=np.float64)[LATE_BEHAVIOURS]
        late = np.minimum(self.owed / np.maximum(capacity, 1e-9), LATE_CEILING)
        late = np.maximum(late, late[0])
        self.owed -= late * capacity
        return late


def visit_thresholds(live: np.ndarray, left_ms: np.ndarray) -> VisitThresholds:
    """Return the thresholds of visits.

    Args:
        live: ``[n] bool``.
        left_ms: ``[n]``, time until the room closes, or the length of the video.
    """
    left = left_ms.astype(np.float64)
    return VisitThresholds(
        effective=np.where(live, LIVE_EFFECTIVE_MS, np.minimum(VIDEO_EFFECTIVE_MS, np.floor(left / 2))),
        long=np.where(live, LIVE_LONG_MS, np.minimum(VIDEO_LONG_MS, left)),
        limit=np.where(live, left, VIDEO_LOOPS * left),
    )


def draw_outcome(
    rng: np.random.Generator,
    probabilities: BehaviourProbabilities,
    thresholds: VisitThresholds,
    live: np.ndarray,
    late_share: LateShare,
) -> VisitOutcome:
    """Draw the behaviours, delays and times watched of ``n`` visits.

    Args:
        rng: random stream.
        probabilities: true probabilities.
        thresholds: thresholds of the time watched.
        live: ``[n] bool``.
        late_share: state that is carried over the calls of a world.
    """
    n = len(live)
    uniform = rng.random((19, n), np.float32)
    clicked = uniform[0] < probabilities.click
    effective = uniform[1] < np.where(clicked, probabilities.effective[1], probabilities.effective[0])
    long = effective & (uniform[2] < np.where(clicked, probabilities.long[1], probabilities.long[0]))
    shallow, halfway, deep = probabilities.interaction
    acted = clicked & (uniform[3:7] < np.where(long, deep, np.where(effective, halfway, shallow)))

    low, high = np.where(effective, thresholds.effective, 0), np.where(effective, thresholds.long, thresholds.effective)
    median_beyond = np.where(live, LIVE_BEYOND_MS, VIDEO_BEYOND * thresholds.long)
    beyond = median_beyond * np.exp(1.2 * rng.standard_normal(n, np.float32))
    play = np.minimum(np.where(long, thresholds.long + beyond, low + uniform[7] * (high - low)), thresholds.limit)

    on_air = np.flatnonzero(live)
    late_capable = on_air[thresholds.limit[on_air] >= ROOM_FOR_LATE_MS]
    late = late_share.draw(probabilities, on_air, late_capable)
    late_candidates = late_capable[clicked[late_capable] & long[late_capable]]
    click_late = uniform[8, late_candidates] < late[0]
    # given an early click, late[1:] must be reached by this conditional probability
    rest_late = click_late | (uniform[9:13, late_candidates] < ((late[1:] - late[0]) / (1 - late[0]))[:, None])

    fast_end = np.minimum(play, FAST_MS)
    slow_end = np.minimum(thresholds.limit, SLOW_MS)
    # the fourth power: most clicks come at the start of a visit
    click_at = fast_end * uniform[13] ** 4
    rows = late_candidates[click_late]
    click_at[rows] = _between(FAST_MS + 1, slow_end[rows], uniform[13, rows])
    rest_at = click_at + (fast_end - click_at) * uniform[14:18]
    kind, position = np.nonzero(rest_late)
    rows = late_candidates[position]
    rest_at[kind, rows] = _between(np.maximum(click_at[rows], FAST_MS + 1), slow_end[rows], uniform[14 + kind, rows])

    delay = np.empty((len(BEHAVIOURS), n), np.int32)
    delay[CLICK] = np.where(clicked, click_at, -1)
    delay[EFFECTIVE_VIEW] = np.where(effective, thresholds.effective, -1)
    delay[LONG_VIEW] = np.where(long, thresholds.long, -1)
    delay[INTERACTIONS] = np.where(acted, rest_at, -1)
    # A user stays for a while after the last behaviour, but the visit must not become another kind of view or outlast
    # its limit: the views have been drawn already.
    last = delay.max(axis=0)
    stay = np.where(long, thresholds.limit, high - 1)
    lingering = np.minimum(last + SECOND_MS * (1 + 60 * uniform[18].astype(np.float64)), stay)
    play = np.where(clicked & (last >= play - SECOND_MS), lingering, play)
    return VisitOutcome(delay, np.floor(play).astype(np.int64))


def _between(low: np.ndarray | float, high: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return times that are log-uniform between ``low`` and ``high``: most late behaviours are not very late."""
    return low * (high / low) ** uniform.astype(np.float64)
