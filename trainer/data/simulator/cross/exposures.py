"""Everything that users are shown and do, all exposures of a block of users at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import GIFT, INTERACTIONS, Chances, chances
from trainer.data.simulator.config import BEHAVIOURS, DAY_MS, START_MS
from trainer.data.simulator.content import LIVE, VIDEO
from trainer.data.simulator.cross.config import AUTHORS, GENRES, LATEST_VIDEOS, STYLES, CrossConfig
from trainer.data.simulator.cross.population import Catalogue, Users, genre_of, latest_video, open_room, style_of
from trainer.data.simulator.visit_outcome import Clock, LateShare, clock, draw_outcome

BLOCK = 64
"""Users drawn together; part of what a seed means."""

LIVE_SHARE = 0.15
SESSION = 28
"""Mean number of exposures of a session."""
NEW_MOOD = 0.7
"""Chance that a session brings a new mood."""
THEME = 500
"""Mean number of exposures that a theme lasts."""
MOOD_SHARE = (0.65, 0.3)
"""Share of videos and of rooms that are picked from the mood's genre; the rest are anybody's."""

LEAST_GAP_MS, MEAN_MORE_MS = (21_000, 64_000), (15_000, 150_000)
"""From the exposure of a video or a room to the next one: at least so long, which is time for a long view, and so much
more on average. What comes next takes the user away from what is watched, however it is liked."""
PAUSE_MS = 1_000

INTERESTS: tuple[str, ...] = ("mood", "slow", "bond", "live_slow", "theme")
FACTORS: tuple[str, ...] = ("constant", *INTERESTS, "quality", "trait")
"""What a log-odds is linear in."""

VIDEO_WEIGHTS: dict[str, tuple[float, ...]] = {
    # click effective long  like comment gift follow
    "constant": (0.6, 0.3, -1.6, -3.2, -5.2, 0.0, -4.6),
    "bond": (1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "slow": (0.0, 1.6, 0.0, 0.0, 0.0, 0.0, 0.0),
    "theme": (0.0, 0.0, 2.6, 0.0, 0.0, 0.0, 0.0),
    "quality": (0.1, 0.1, 0.0, 0.2, 0.2, 0.0, 0.2),
    "trait": (1.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0),
}
LIVE_WEIGHTS: dict[str, tuple[float, ...]] = {
    "constant": (-2.3, 0.3, -0.9, -2.7, -3.0, -4.3, -3.4),
    "mood": (1.5, 0.2, 0.0, 0.6, 0.3, 0.4, 0.6),
    "slow": (1.0, 0.3, 0.2, 0.5, 0.4, 0.4, 0.5),
    "bond": (0.8, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5),
    "live_slow": (0.9, 0.4, 0.3, 0.4, 0.5, 0.6, 0.4),
    "theme": (1.2, 0.4, 1.6, 0.7, 0.6, 0.8, 0.6),
    "quality": (0.4, 0.2, 0.1, 0.2, 0.1, 0.2, 0.3),
    "trait": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
}
"""Factor -> weight for each of ``BEHAVIOURS``; a factor that is not there has none."""


@dataclass(frozen=True)
class Exposures:
    """``n`` exposures, by user and then in order of time.

    Attributes:
        user: ``[n] int64``.
        number: ``[n] int64``, how many the user had before.
        time_ms: ``[n] int64``.
        domain: ``[n] int64``.
        item: ``[n] int64``.
        author: ``[n] int64``.
        room_ms: ``[n] int64``, until something else comes.
        interests: name -> ``[n] float32``, the user's in this item at that time.
    """

    user: np.ndarray
    number: np.ndarray
    time_ms: np.ndarray
    domain: np.ndarray
    item: np.ndarray
    author: np.ndarray
    room_ms: np.ndarray
    interests: dict[str, np.ndarray]


def visits_of(config: CrossConfig, catalogue: Catalogue, users: Users) -> Iterator[dict[str, np.ndarray]]:
    """Visits block by block: columns under their names in schema.py, ``delay`` and ``truth`` ``[behaviours, n]``, and
    the ``interests``, one column each."""
    for block, first in enumerate(range(0, config.users, BLOCK)):
        rng = config.generator("life", block)
        shown = exposures(config, catalogue, users, np.arange(first, min(first + BLOCK, config.users)), rng)
        chance = true_chances(catalogue, users, shown)
        on_air = shown.domain == LIVE
        outcome = draw_outcome(rng, chance, _clock(catalogue, shown), on_air, LateShare())
        yield {
            "visit_id": (shown.user << 24) + shown.number,
            "user_id": shown.user,
            "author_id": shown.author,
            "item_id": shown.item,
            "domain": shown.domain,
            "request_ms": shown.time_ms,
            "play_ms": outcome.play_ms,
            "delay": outcome.delay,
            "truth": chance.marginal,
            **shown.interests,
        }


def exposures(
    config: CrossConfig, catalogue: Catalogue, users: Users, block: np.ndarray, rng: np.random.Generator
) -> Exposures:
    """What the users ``block [m]`` are shown, and when; nothing of it depends on what they do."""
    count = np.maximum(rng.poisson(users.daily[block] * config.days), 1)
    first = np.cumsum(count) - count
    n = int(count.sum())
    user = np.repeat(block, count)
    begins = np.zeros(n, bool)
    begins[first] = True
    number = np.arange(n) - np.repeat(first, count)

    domain = np.where(rng.random(n) < LIVE_SHARE, LIVE, VIDEO)
    session = begins | (rng.random(n) < 1 / SESSION)
    mood = _held(rng, begins | (session & (rng.random(n) < NEW_MOOD)), GENRES)
    theme = _held(rng, begins | (rng.random(n) < 1 / THEME), STYLES)

    gap = np.take(LEAST_GAP_MS, domain) + np.take(MEAN_MORE_MS, domain) * rng.standard_exponential(n)
    # Sessions are spread over the days by their expected number alone, whatever happens in them.
    pause = SESSION * (config.days * DAY_MS / np.repeat(count, count) - _mean_gap())
    pause = np.where(session, np.maximum(pause, 0) * rng.standard_exponential(n), 0)
    before = np.where(begins, 0, np.roll(gap, 1)) + pause
    elapsed = np.cumsum(before.astype(np.int64))
    time_ms = START_MS + elapsed - np.repeat(elapsed[first] - before[first].astype(np.int64), count)

    anybody = rng.integers(0, AUTHORS, n)
    of_mood = mood + GENRES * rng.integers(0, AUTHORS // GENRES, n)
    author = np.where(rng.random(n) < np.take(MOOD_SHARE, domain), of_mood, anybody)
    back = rng.integers(0, LATEST_VIDEOS, n)

    kept = np.flatnonzero(time_ms < config.end_ms)
    user, author, domain, time_ms = user[kept], author[kept], domain[kept], time_ms[kept]
    video = latest_video(config, catalogue, author, time_ms) - back[kept]
    item = np.where(domain == LIVE, open_room(config, catalogue, author, time_ms), video)
    niche = catalogue.niche[item]
    return Exposures(
        user=user,
        number=number[kept],
        time_ms=time_ms,
        domain=domain,
        item=item,
        author=author,
        room_ms=gap[kept].astype(np.int64) - PAUSE_MS,
        interests={
            "mood": (genre_of(author) == mood[kept]).astype(np.float32),
            "slow": users.slow[user, niche],
            "bond": users.bond[user, author],
            "live_slow": users.live_slow[user, niche],
            "theme": (style_of(author) == theme[kept]).astype(np.float32),
        },
    )


def true_chances(catalogue: Catalogue, users: Users, shown: Exposures) -> Chances:
    """True probabilities of every behaviour."""
    weights = np.stack([_weights(VIDEO_WEIGHTS), _weights(LIVE_WEIGHTS)])
    n = len(shown.user)
    trait = users.trait[shown.user].T
    logits = weights[shown.domain, 0].T + weights[shown.domain, FACTORS.index("trait")].T * trait
    values = {**shown.interests, "quality": catalogue.quality[shown.author]}
    for name, value in values.items():
        logits += weights[shown.domain, FACTORS.index(name)].T * value
    allowed = np.ones((INTERACTIONS.stop - INTERACTIONS.start, n), np.float32)
    allowed[GIFT - INTERACTIONS.start] = shown.domain == LIVE
    return chances(np.ascontiguousarray(logits, np.float32), allowed)


def _clock(catalogue: Catalogue, shown: Exposures) -> Clock:
    """Thresholds as everywhere; who is taken away has had time for a long view, so they bind first."""
    on_air = shown.domain == LIVE
    length = catalogue.length_ms[np.where(on_air, 0, shown.item)]
    own = clock(on_air, np.where(on_air, shown.room_ms, length))
    return Clock(own.effective, own.long, np.minimum(own.limit, shown.room_ms.astype(np.float64)))


def _held(rng: np.random.Generator, changes: np.ndarray, values: int) -> np.ndarray:
    """A random value in [0, values) at each change, which holds until the next, ``[n] int64``."""
    drawn = rng.integers(0, values, len(changes))
    return drawn[np.maximum.accumulate(np.where(changes, np.arange(len(changes)), 0))]


def _mean_gap() -> float:
    video, live = (least + more for least, more in zip(LEAST_GAP_MS, MEAN_MORE_MS, strict=True))
    return (1 - LIVE_SHARE) * video + LIVE_SHARE * live


def _weights(of: dict[str, tuple[float, ...]]) -> np.ndarray:
    """``[factors, behaviours] float32``."""
    return np.array([of.get(name, (0.0,) * len(BEHAVIOURS)) for name in FACTORS], np.float32)
