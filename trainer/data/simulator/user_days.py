"""Users' days, one exposure after the other, all users of a block at once.

Users influence each other only through what is on air, so a block of users is simulated on its own. Within a block the
n-th exposures of all users' days are one vector: follow relations, acquaintances and moods are always up to date, and
nobody watches two things at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import FACTORS, FOLLOW, GIFT, INTERACTIONS, chances, log_odds
from trainer.data.simulator.config import DAY_MS, HOUR_MS, START_MS, hours_of_day, local_hour
from trainer.data.simulator.content import LIVE, VIDEO
from trainer.data.simulator.exposure import FAMILIAR, FEED, PLAZA, SCENE_EDGES, choose
from trainer.data.simulator.population import GENRES_PER_CATEGORY, HOLD, SOCIAL, TASTE
from trainer.data.simulator.user_state import ACQUAINTANCES, Memory, first_memory
from trainer.data.simulator.visit_outcome import LateShare, clock, draw_outcome
from trainer.data.simulator.world import World

BLOCK = 4_096
"""Users simulated together; part of what a seed means."""

LIVE_SHARE = 0.1
SESSIONS, MORE_SESSIONS = 5, 1.2
"""Most sessions a day, and the mean number of those after the first."""
LONGEST_DAY = 5
"""No user's day has more exposures than so many times the world's mean."""
WEEKDAY, WEEKEND = 0.92, 1.2
PAUSE_MS = (300, 1_800)
"""Shortest and longest time between a visit and the next exposure of a session."""
LONG_MEMORY = 20
"""Views of an author beyond this count add nothing."""
REPEAT_OF_VIEWS = np.log1p(np.minimum(np.arange(256), LONG_MEMORY), dtype=np.float32)
SUBSPACES = [
    (name, part, np.float32(1 / np.sqrt(part.stop - part.start)))
    for name, part in (("taste", TASTE), ("hold", HOLD), ("social", SOCIAL))
]
ROW = {name: row for row, name in enumerate(FACTORS)}
POSITIONS = 12
"""Position in a session as a feature: 1 to 12, the last one for all that follow."""

Visits = dict[str, np.ndarray]
"""Columns of a visit under their names in schema.py; ``delay`` and ``truth`` are ``[behaviours, n]``."""


@dataclass(frozen=True)
class Exposures:
    """One exposure of each of ``n`` users: ``who`` in the block, by id, when, where, and what is shown; int64."""

    who: np.ndarray
    user: np.ndarray
    time_ms: np.ndarray
    scene: np.ndarray
    domain: np.ndarray
    item: np.ndarray
    author: np.ndarray


def visits_of(world: World) -> Iterator[Visits]:
    """The visits of a world, block by block of users and day by day, each user's in time order.

    Only the current block and its day are in memory.
    """
    config = world.config
    for block, first in enumerate(range(0, config.users, BLOCK)):
        user = np.arange(first, min(first + BLOCK, config.users))
        memory = first_memory(world, user, config.generator("memory", block))
        late_share = LateShare()
        for day in range(config.days):
            yield _day(world, memory, late_share, day, config.generator("life", block, day))


def _day(world: World, memory: Memory, late_share: LateShare, day: int, rng: np.random.Generator) -> Visits:
    users, user, config = world.users, memory.user, world.config
    mean = users.daily[user] * (WEEKEND if day % 7 >= 5 else WEEKDAY)
    count = np.minimum(rng.poisson(mean), int(LONGEST_DAY * config.exposures_per_day))
    sessions = np.minimum(1 + rng.poisson(MORE_SESSIONS, len(user)), SESSIONS)
    hour = (hours_of_day(rng.random((len(user), SESSIONS))) + users.shift_hours[user, None]) % 24
    starts = START_MS + day * DAY_MS + np.sort(hour * HOUR_MS, axis=1).astype(np.int64)
    memory.session[:] = -1
    # the users with the longest day come first, so those still awake are always a prefix
    order = np.argsort(-count, kind="stable")
    count, sessions = count[order], sessions[order]
    steps = []
    for step in range(max(1, int(count[0]))):
        awake = order[: np.searchsorted(-count, -step)]
        session = step * sessions[: len(awake)] // count[: len(awake)]
        memory.enter_session(users, awake, session, starts[awake, session], rng)
        awake = awake[memory.now_ms[awake] < config.end_ms]
        steps.append(_watch(world, memory, late_share, awake, rng))
    return {name: np.concatenate([step[name] for step in steps], axis=-1) for name in steps[0]}


def _watch(world: World, memory: Memory, late_share: LateShare, who: np.ndarray, rng: np.random.Generator) -> Visits:
    """One visit of each of the users ``who [n]`` of the block, from exposure to exit."""
    shown = _expose(world, memory, who, rng)
    on_air = shown.domain == LIVE
    following = memory.following[who, shown.author]
    allowed = np.ones((INTERACTIONS.stop - INTERACTIONS.start, len(who)), np.float32)
    allowed[GIFT - INTERACTIONS.start] = on_air
    allowed[FOLLOW - INTERACTIONS.start] = ~following
    factors, context = _factors(world, memory, shown, following)
    inclination = world.users.inclination(shown.domain, shown.user)
    chance = chances(log_odds(factors, context, shown.scene, inclination.T), allowed)
    items = world.items
    left = items.end_ms[shown.item] - np.where(on_air, shown.time_ms, items.start_ms[shown.item])
    outcome = draw_outcome(rng, chance, clock(on_air, left), on_air, late_share)

    visits = {
        "visit_id": (shown.user << 24) + memory.exposures[who],
        "user_id": shown.user,
        "author_id": shown.author,
        "item_id": shown.item,
        "domain": shown.domain,
        "request_ms": shown.time_ms,
        "play_ms": outcome.play_ms,
        "scene": shown.scene,
        "position": np.minimum(1 + memory.position[who], POSITIONS),
        "delay": outcome.delay,
        "truth": chance.marginal,
    }
    memory.remember(who, shown.author, outcome.delay)
    memory.now_ms[who] = shown.time_ms + outcome.play_ms + rng.integers(*PAUSE_MS, len(who))
    return visits


def _expose(world: World, memory: Memory, who: np.ndarray, rng: np.random.Generator) -> Exposures:
    """What each of the users ``who`` is shown at their own time."""
    user, now = memory.user[who], memory.now_ms[who]
    uniform = rng.random((2, len(who)))
    live_slot = uniform[0] < LIVE_SHARE
    of_video, of_live = (edges.searchsorted(uniform[1], side="right") for edges in SCENE_EDGES)
    scene = np.where(live_slot, of_live, of_video)
    item = np.full(len(who), -1)

    def fill(domain: int, at: np.ndarray) -> None:
        familiar = memory.familiar[rng.integers(0, ACQUAINTANCES, (FAMILIAR[domain], len(at))), who[at]]
        mood = memory.mood[who[at]]
        item[at] = choose(world.catalogue, world.users, rng, domain, user[at], now[at], scene[at], mood, familiar)

    fill(LIVE, np.flatnonzero(live_slot))
    # a live slot that no open room can fill goes to a video
    rest = np.flatnonzero(item < 0)
    scene[rest[scene[rest] == PLAZA]] = FEED
    fill(VIDEO, rest)
    domain = np.where(item >= world.items.videos, LIVE, VIDEO)
    return Exposures(who, user, now, scene, domain, item, world.items.author[item])


def _factors(world: World, memory: Memory, shown: Exposures, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``FACTORS`` of each exposure, ``[factors, n] float32``, and the context whose weights apply, ``[n]``."""
    users, items = world.users, world.items
    user, item = shown.user, shown.item
    interest, vector = users.interest(shown.domain, user), items.vector.take(item, axis=0)
    genre = items.genre[item]
    category = genre // GENRES_PER_CATEGORY
    context = np.where(shown.domain == LIVE, 1 + category, 0)
    views = memory.views[shown.who, shown.author]
    factors = {
        name: scale * np.einsum("nd,nd->n", interest[:, part], vector[:, part]) for name, part, scale in SUBSPACES
    }
    factors |= {
        "constant": np.float32(1),
        "mood": genre == memory.mood[shown.who],
        "following": following,
        "repeat": REPEAT_OF_VIEWS.take(views),
        "novelty": users.novelty[user] * (views == 0),
        "quality": items.quality[item],
        "bait": items.bait[item],
        "warmth": world.authors.warmth[shown.author],
        "popularity": items.popularity[item],
        "category": users.category_interest[user, category],
        "hour": world.category_hour[context, local_hour(shown.time_ms)],
        "fatigue": np.log1p(memory.position[shown.who], dtype=np.float32),
        "generosity": users.trait[LIVE, :, GIFT][user] * following,
    }
    matrix = np.zeros((len(FACTORS), len(user)), np.float32)
    for name, values in factors.items():
        matrix[ROW[name]] = values
    on_air = np.flatnonzero(context)
    segment = items.segment(item[on_air], shown.time_ms[on_air])
    intensity = items.intensity[segment]
    matrix[ROW["intensity"], on_air] = intensity
    matrix[ROW["topic"], on_air] = intensity * users.topic_taste[user[on_air], items.topic[segment]]
    matrix[ROW["quiet"], on_air] = 1 - intensity
    return matrix, context
