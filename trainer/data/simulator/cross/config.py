"""Size and constants of the cross world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import DAY_MS, HOUR_MS, START_MS

GENRES, STYLES = 6, 6
"""Numbers of genres and styles, two ways to group authors; every genre has authors of every style."""
AUTHORS = 4 * GENRES * STYLES
NICHES = 96
"""Number of niches: subjects of videos and rooms, independent of the author."""

LATEST_VIDEOS = 5
"""Number of an author's latest videos from which the shown one is drawn."""
VIDEO_EVERY_MS, ROOM_EVERY_MS = DAY_MS, 12 * HOUR_MS
"""Intervals at which an author publishes a video and opens a room. Users in the old room stay in it."""

VECTOR_DIM, VECTOR_NOISE = 32, 0.35
"""Dimension of an item's content vector, and length of its noise relative to the unit vector of the niche."""

ACTIVITY_SPREAD, MOST_PER_DAY = 0.8, 200
ACTIVITY_BANDS = 4
"""Bands with equal numbers of users by activity: low, middle, high and full, as in Table 4 of Moment&Cross."""


@dataclass(frozen=True)
class CrossConfig:
    """Parameters of a cross world. The same values give the same world and the same log, bit for bit.

    Attributes:
        users: number of users.
        days: number of simulated days, starting at ``START_MS``; with 60 days users have 4,000 visits on average and
            up to 12,000.
        seed: seed of every random stream.
        exposures_per_day: mean number of exposures per user and day.
    """

    users: int
    days: int
    seed: int
    exposures_per_day: float = 70.0

    @property
    def videos_per_author(self) -> int:
        """Number of videos per author: those of the log's days, plus ``LATEST_VIDEOS`` from before its start."""
        return self.days * DAY_MS // VIDEO_EVERY_MS + LATEST_VIDEOS

    @property
    def rooms_per_author(self) -> int:
        """Number of rooms per author: those of the log's days, plus the one that is open when it starts."""
        return self.days * DAY_MS // ROOM_EVERY_MS + 1

    @property
    def videos(self) -> int:
        """Number of videos; ids from this number on are rooms."""
        return AUTHORS * self.videos_per_author

    @property
    def items(self) -> int:
        """Number of videos and rooms."""
        return self.videos + AUTHORS * self.rooms_per_author

    @property
    def end_ms(self) -> int:
        """First millisecond after the last day."""
        return START_MS + self.days * DAY_MS

    def generator(self, part: str, *index: int) -> np.random.Generator:
        """Return the random stream of one part of the world; the streams of different parts are independent."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(*b"cross", *part.encode(), *index)))
