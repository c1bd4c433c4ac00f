"""Exposures and behaviours of users, drawn at once for a block of users and all days."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import GIFT, INTERACTIONS, BehaviourProbabilities, behaviour_probabilities
from trainer.data.simulator.config import BEHAVIOURS, DAY_MS, START_MS
from trainer.data.simulator.content import LIVE, VIDEO
from trainer.data.simulator.cross.config import AUTHORS, GENRES, LATEST_VIDEOS, STYLES, CrossConfig
from trainer.data.simulator.cross.population import (
    CrossCatalogue,
    CrossUsers,
    genre_of,
    latest_video,
    open_room,
    style_of,
)
from trainer.data.simulator.visit_outcome import LateShare, VisitThresholds, draw_outcome, visit_thresholds

BLOCK = 64
"""Number of users drawn together. The world of a seed depends on this value."""

LIVE_SHARE = 0.15
SESSION = 28
"""Mean number of exposures of a session."""
NEW_MOOD = 0.7
"""Probability that a session has a new mood."""
THEME = 500
"""Mean number of exposures that a theme lasts."""
MOOD_SHARE = (0.65, 0.3)
"""Share of videos and of rooms whose author is drawn from the genre of the mood; the other authors are random."""

LEAST_GAP_MS, MEAN_MORE_MS = (21_000, 64_000), (15_000, 150_000)
"""Time from the exposure of a video or a room to the next exposure: the least, which suffices for a long view, and the
mean of the additional time. The next exposure ends the visit, whatever the user's interest."""
PAUSE_MS = 1_000

INTERESTS: tuple[str, ...] = ("mood", "slow", "bond", "live_slow", "theme")
FACTORS: tuple[str, ...] = ("constant", *INTERESTS, "quality", "trait")
"""Factors of the log-odds, which are linear in them."""

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
"""Weights for each of ``BEHAVIOURS`` by factor; a missing factor has weight 0."""


@dataclass(frozen=True)
class CrossExposures:
    """Columns of ``n`` exposures, sorted by user and then by time.

    Attributes:
        user: ``[n] int64``.
        number: ``[n] int64``, number of earlier exposures of the user.
        time_ms: ``[n] int64``, time of the request.
        domain: ``[n] int64``.
        item: ``[n] int64``.
        author: ``[n] int64``.
        available_ms: ``[n] int64``, longest time that the user can watch before the next exposure.
        interests: by name, ``[n] float32``, the user's interest in the item at that time.
    """

    user: np.ndarray
    number: np.ndarray
    time_ms: np.ndarray
    domain: np.ndarray
    item: np.ndarray
    author: np.ndarray
    available_ms: np.ndarray
    interests: dict[str, np.ndarray]


def simulate_visits(
    config: CrossConfig, catalogue: CrossCatalogue, users: CrossUsers
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the visits of a world, block of users by block.

    A block has columns by their names in ``trainer/data/format/schema.py``, ``delay`` and ``truth`` ``[behaviours,
    n]``, and one column for each of ``INTERESTS``.
    """
    for block, first in enumerate(range(0, config.users, BLOCK)):
        rng = config.generator("life", block)
        shown = draw_exposures(config, catalogue, users, np.arange(first, min(first + BLOCK, config.users)), rng)
        probabilities = true_probabilities(catalogue, users, shown)
        on_air = shown.domain == LIVE
        outcome = draw_outcome(rng, probabilities, _thresholds(catalogue, shown), on_air, LateShare())
        yield {
            "visit_id": (shown.user << 24) + shown.number,
            "user_id": shown.user,
            "author_id": shown.author,
            "item_id": shown.item,
            "domain": shown.domain,
            "request_ms": shown.time_ms,
            "play_ms": outcome.play_ms,
            "delay": outcome.delay,
            "truth": probabilities.marginal,
            **shown.interests,
        }


def draw_exposures(
    config: CrossConfig, catalogue: CrossCatalogue, users: CrossUsers, block: np.ndarray, rng: np.random.Generator
) -> CrossExposures:
    """Draw all exposures of the users ``block [m]``. They do not depend on the users' behaviours."""
    count = np.maximum(rng.poisson(users.daily[block] * config.days), 1)
    first = np.cumsum(count) - count
    n = int(count.sum())
    user = np.repeat(block, count)
    begins = np.zeros(n, bool)
    begins[first] = True
    number = np.arange(n) - np.repeat(first, count)

    domain = np.where(rng.random(n) < LIVE_SHARE, LIVE, VIDEO)
    session = begins | (rng.random(n) < 1 / SESSION)
    mood = _hold_until_change(rng, begins | (session & (rng.random(n) < NEW_MOOD)), GENRES)
    theme = _hold_until_change(rng, begins | (rng.random(n) < 1 / THEME), STYLES)

    gap = np.take(LEAST_GAP_MS, domain) + np.take(MEAN_MORE_MS, domain) * rng.standard_exponential(n)
    # Pauses follow from the expected number of sessions only: time does not depend on what happens in a session.
    pause = SESSION * (config.days * DAY_MS / np.repeat(count, count) - _mean_gap())
    pause = np.where(session, np.maximum(pause, 0) * rng.standard_exponential(n), 0)
    before = np.where(begins, 0, np.roll(gap, 1)) + pause
    elapsed = np.cumsum(before.astype(np.int64))
    time_ms = START_MS + elapsed - np.repeat(elapsed[first] - before[first].astype(np.int64), count)

    any_author = rng.integers(0, AUTHORS, n)
    of_mood = mood + GENRES * rng.integers(0, AUTHORS // GENRES, n)
    author = np.where(rng.random(n) < np.take(MOOD_SHARE, domain), of_mood, any_author)
    back = rng.integers(0, LATEST_VIDEOS, n)

    kept = np.flatnonzero(time_ms < config.end_ms)
    user, author, domain, time_ms = user[kept], author[kept], domain[kept], time_ms[kept]
    video = latest_video(config, catalogue, author, time_ms) - back[kept]
    item = np.where(domain == LIVE, open_room(config, catalogue, author, time_ms), video)
    niche = catalogue.niche[item]
    return CrossExposures(
        user=user,
        number=number[kept],
        time_ms=time_ms,
        domain=domain,
        item=item,
        author=author,
        available_ms=gap[kept].astype(np.int64) - PAUSE_MS,
        interests={
            "mood": (genre_of(author) == mood[kept]).astype(np.float32),
            "slow": users.slow[user, niche],
            "bond": users.bond[user, author],
            "live_slow": users.live_slow[user, niche],
            "theme": (style_of(author) == theme[kept]).astype(np.float32),
        },
    )


def true_probabilities(catalogue: CrossCatalogue, users: CrossUsers, shown: CrossExposures) -> BehaviourProbabilities:
    """Return the true probabilities of every behaviour of the exposures."""
    weights = np.stack([_weight_matrix(VIDEO_WEIGHTS), _weight_matrix(LIVE_WEIGHTS)])
    n = len(shown.user)
    trait = users.trait[shown.user].T
    logits = weights[shown.domain, 0].T + weights[shown.domain, FACTORS.index("trait")].T * trait
    values = {**shown.interests, "quality": catalogue.quality[shown.author]}
    for name, value in values.items():
        logits += weights[shown.domain, FACTORS.index(name)].T * value
    allowed = np.ones((INTERACTIONS.stop - INTERACTIONS.start, n), np.float32)
    allowed[GIFT - INTERACTIONS.start] = shown.domain == LIVE
    return behaviour_probabilities(np.ascontiguousarray(logits, np.float32), allowed)


def _thresholds(catalogue: CrossCatalogue, shown: CrossExposures) -> VisitThresholds:
    """Return the thresholds of the visits, with the time watched limited by the next exposure.

    ``LEAST_GAP_MS`` leaves time for a long view before the next exposure, so the thresholds stay below the limit.
    """
    on_air = shown.domain == LIVE
    length = catalogue.length_ms[np.where(on_air, 0, shown.item)]
    thresholds = visit_thresholds(on_air, np.where(on_air, shown.available_ms, length))
    return VisitThresholds(
        thresholds.effective, thresholds.long, np.minimum(thresholds.limit, shown.available_ms.astype(np.float64))
    )


def _hold_until_change(rng: np.random.Generator, changes: np.ndarray, values: int) -> np.ndarray:
    """Draw a random value in [0, values) at each change and hold it until the next one, ``[n] int64``."""
    drawn = rng.integers(0, values, len(changes))
    return drawn[np.maximum.accumulate(np.where(changes, np.arange(len(changes)), 0))]


def _mean_gap() -> float:
    """Return the mean time between two exposures of a session, in milliseconds."""
    video, live = (least + more for least, more in zip(LEAST_GAP_MS, MEAN_MORE_MS, strict=True))
    return (1 - LIVE_SHARE) * video + LIVE_SHARE * live


def _weight_matrix(table: dict[str, tuple[float, ...]]) -> np.ndarray:
    """Return the weights of all factors, ``[factors, behaviours] float32``."""
    return np.array([table.get(name, (0.0,) * len(BEHAVIOURS)) for name in FACTORS], np.float32)
