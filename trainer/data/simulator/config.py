"""Size, clock and random streams of a simulated world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIMEZONE = "Asia/Shanghai"
START_MS = 1_709_481_600_000
"""Monday, 4 March 2024, 00:00 in ``TIMEZONE``, which has no daylight saving time."""

SECOND_MS = 1_000
MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000

HOUR_SHARE = np.array(
    [3, 2, 1.2, 0.8, 0.7, 0.9, 1.8, 3, 3.6, 3.6, 3.8, 4.4, 5.6, 5, 4.2, 4, 4.2, 4.8, 6, 7.4, 8.6, 9, 7.8, 5], np.float64
)
"""Relative activity by local hour: a lunch peak and a longer evening peak."""

BEHAVIOURS: tuple[str, ...] = ("click", "effective_view", "long_view", "like", "comment", "gift", "follow")
"""Behaviours in label order."""

MAX_AUTHORS = 16_384
"""Upper limit of the number of authors. It bounds ``UserState``, which holds a dense matrix of users by authors."""


@dataclass(frozen=True)
class WorldConfig:
    """Parameters of a world. The same values give the same world and the same log, bit for bit.

    Attributes:
        users: number of users.
        days: number of simulated days, starting at ``START_MS``.
        seed: seed of every random stream.
        exposures_per_day: mean number of exposures per user and day. A long visit can shorten a day, so the log has
            somewhat fewer.
        lookahead: True if long views and gifts depend on the next three minutes of a room, too.
        newcomers: share of the live authors who open their first room on a random day of the log, from 0 to 1.
        interest_correlation: correlation over users between the interest in videos and that in rooms, from 0 to 1, in
            each number of ``Users.vector``; None for the world of earlier versions, where it is about 0.7.
        conflict: how much what draws clicks repels likes, comments, gifts and follows, from 0 to 1
            (``behaviours.weights_of``).
    """

    users: int
    days: int
    seed: int
    exposures_per_day: float = 36.0
    lookahead: bool = False
    newcomers: float = 0.0
    interest_correlation: float | None = None
    conflict: float = 0.0

    @property
    def authors(self) -> int:
        """Number of authors: one for every five users, at least 60 so that a small world has enough candidates."""
        return int(np.clip(self.users // 5, 60, MAX_AUTHORS))

    @property
    def end_ms(self) -> int:
        """First millisecond after the last day."""
        return START_MS + self.days * DAY_MS

    def generator(self, part: str, *index: int) -> np.random.Generator:
        """Return the random stream of one part of the world, such as ``("life", block, day)``.

        The streams of different parts are independent.
        """
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(*part.encode(), *index)))


def local_hour(time_ms: np.ndarray) -> np.ndarray:
    """Return the hour of the day in ``TIMEZONE``, ``[n] int64`` in 0..23."""
    return (time_ms - START_MS) // HOUR_MS % 24


def hours_of_day(uniform: np.ndarray) -> np.ndarray:
    """Map uniform numbers in [0, 1) to hours in [0, 24) distributed as ``HOUR_SHARE``; same shape, float64."""
    edges = np.concatenate([[0.0], np.cumsum(HOUR_SHARE) / HOUR_SHARE.sum()])
    return np.interp(uniform, edges, np.arange(25.0))
