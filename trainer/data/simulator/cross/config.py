"""Size and constants of the world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import DAY_MS, HOUR_MS, START_MS

GENRES, STYLES = 6, 6
"""Ways to group authors; every genre has authors of every style."""
AUTHORS = 4 * GENRES * STYLES
NICHES = 96
"""What videos and rooms are about, whoever makes them."""

LATEST_VIDEOS = 5
"""Which an author's videos are shown of."""
VIDEO_EVERY_MS, ROOM_EVERY_MS = DAY_MS, 12 * HOUR_MS
"""An author publishes a video and opens a room so often. Who is in the old room then stays in it."""

VECTOR_DIM, VECTOR_NOISE = 32, 0.35
"""Of an item's content vector: its niche's direction, and noise so strong in relation to it."""

ACTIVITY_SPREAD, MOST_PER_DAY = 0.8, 200
ACTIVITY_BANDS = 4
"""Equal numbers of users from the least to the most active: low, middle, high and full, as in the paper's Table 4."""


@dataclass(frozen=True)
class CrossConfig:
    """What a world is made from. The same values give the same world and the same log, bit for bit.

    Attributes:
        users: number of users.
        days: simulated days, from ``START_MS`` on; with 60 days users have 4,000 visits on average and up to 12,000.
        seed: of every random stream.
        exposures_per_day: mean over users.
    """

    users: int
    days: int
    seed: int
    exposures_per_day: float = 70.0

    @property
    def videos_per_author(self) -> int:
        """Those of the log's days, and the latest when it starts."""
        return self.days * DAY_MS // VIDEO_EVERY_MS + LATEST_VIDEOS

    @property
    def rooms_per_author(self) -> int:
        """Those of the log's days, and the one that is open when it starts."""
        return self.days * DAY_MS // ROOM_EVERY_MS + 1

    @property
    def videos(self) -> int:
        """Number of videos; ids from here on are rooms."""
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
        """The random stream of one part of the world; streams are independent."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(*b"cross", *part.encode(), *index)))
