"""Simulation of the users' days, one exposure after the other, for all users of a block at once.

Users do not influence each other, so each block of users is simulated on its own. Within a block the n-th exposures of
all users' days are one vector. Follow relations, familiar authors and moods are therefore always up to date, and no
user watches two items at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import (
    FACTORS,
    FOLLOW,
    GIFT,
    INTERACTIONS,
    behaviour_probabilities,
    log_odds,
    weights_of,
)
from trainer.data.simulator.config import DAY_MS, HOUR_MS, START_MS, hours_of_day, local_hour
from trainer.data.simulator.content import LIVE, VIDEO
from trainer.data.simulator.exposure import FAMILIAR, FEED, PLAZA, SCENE_EDGES, choose_items
from trainer.data.simulator.lookahead import add_lookahead
from trainer.data.simulator.population import GENRES_PER_CATEGORY, HOLD, SOCIAL, TASTE
from trainer.data.simulator.user_state import FAMILIAR_AUTHORS, UserState, initial_user_state
from trainer.data.simulator.visit_outcome import LateShare, draw_outcome, visit_thresholds
from trainer.data.simulator.world import SimulatedWorld

BLOCK = 4_096
"""Number of users simulated together. The world of a seed depends on this value."""

LIVE_SHARE = 0.1
SESSIONS, MORE_SESSIONS = 5, 1.2
"""Most sessions a day, and the mean number of those after the first."""
LONGEST_DAY = 5
"""Most exposures of a user's day, as a multiple of the world's mean."""
WEEKDAY, WEEKEND = 0.92, 1.2
PAUSE_MS = (300, 1_800)
"""Shortest and longest time between a visit and the next exposure of a session."""
LONG_MEMORY = 20
"""Number of views of an author from which further views have no effect."""
REPEAT_OF_VIEWS = np.log1p(np.minimum(np.arange(256), LONG_MEMORY), dtype=np.float32)
SUBSPACES = [
    (name, part, np.float32(1 / np.sqrt(part.stop - part.start)))
    for name, part in (("taste", TASTE), ("hold", HOLD), ("social", SOCIAL))
]
ROW = {name: row for row, name in enumerate(FACTORS)}
POSITIONS = 12
"""Number of values of the feature ``position``: 1 to 12; the last one covers all later positions of a session."""

VisitColumns = dict[str, np.ndarray]
"""Columns of visits by their names in ``trainer/data/format/schema.py``; ``delay`` and ``truth`` are
``[behaviours, n]``. ``mood``, ``following``, ``views`` and ``session_position`` are those of :class:`RequestState`."""


@dataclass(frozen=True)
class ExposureStep:
    """One exposure of each of ``n`` users of a block; all columns ``[n] int64``.

    ``rows`` are the users' rows in the block, ``user`` their ids, ``time_ms`` the time of the request.
    """

    rows: np.ndarray
    user: np.ndarray
    time_ms: np.ndarray
    scene: np.ndarray
    domain: np.ndarray
    item: np.ndarray
    author: np.ndarray


@dataclass(frozen=True)
class RequestState:
    """State of the users at the requests of ``n`` exposures, of which the log does not tell all.

    Attributes:
        mood: ``[n] int64``, genre that the user currently prefers.
        following: ``[n] bool``, True if the user follows the author.
        views: ``[n] uint8``, earlier effective views of the author.
        session_position: ``[n] int64``, number of earlier exposures in the session.
    """

    mood: np.ndarray
    following: np.ndarray
    views: np.ndarray
    session_position: np.ndarray


def simulate_visits(world: SimulatedWorld) -> Iterator[VisitColumns]:
    """Yield the visits of a world, block of users by block and day by day; each user's visits are in time order.

    Only one day of one block is in memory.
    """
    config = world.config
    for block, first in enumerate(range(0, config.users, BLOCK)):
        user = np.arange(first, min(first + BLOCK, config.users))
        state = initial_user_state(world, user, config.generator("memory", block))
        late_share = LateShare()
        for day in range(config.days):
            yield _simulate_day(world, state, late_share, day, config.generator("life", block, day))


def _simulate_day(
    world: SimulatedWorld, state: UserState, late_share: LateShare, day: int, rng: np.random.Generator
) -> VisitColumns:
    """Simulate one day of a block of users; ``state`` and ``late_share`` are updated."""
    users, user, config = world.users, state.user, world.config
    mean = users.daily[user] * (WEEKEND if day % 7 >= 5 else WEEKDAY)
    count = np.minimum(rng.poisson(mean), int(LONGEST_DAY * config.exposures_per_day))
    sessions = np.minimum(1 + rng.poisson(MORE_SESSIONS, len(user)), SESSIONS)
    hour = (hours_of_day(rng.random((len(user), SESSIONS))) + users.shift_hours[user, None]) % 24
    starts = START_MS + day * DAY_MS + np.sort(hour * HOUR_MS, axis=1).astype(np.int64)
    state.session[:] = -1
    # users with the most exposures come first, so the active users of each step are always a prefix
    order = np.argsort(-count, kind="stable")
    count, sessions = count[order], sessions[order]
    steps = []
    for step in range(max(1, int(count[0]))):
        active = order[: np.searchsorted(-count, -step)]
        # a user's exposures are spread evenly over the sessions of the day
        session = step * sessions[: len(active)] // count[: len(active)]
        state.enter_session(users, active, session, starts[active, session], rng)
        active = active[state.now_ms[active] < config.end_ms]
        steps.append(_simulate_step(world, state, late_share, active, rng))
    return {name: np.concatenate([step[name] for step in steps], axis=-1) for name in steps[0]}


def _simulate_step(
    world: SimulatedWorld, state: UserState, late_share: LateShare, rows: np.ndarray, rng: np.random.Generator
) -> VisitColumns:
    """Simulate one visit of each of the users ``rows [n]`` of the block, from exposure to exit."""
    shown = _draw_exposures(world, state, rows, rng)
    on_air = shown.domain == LIVE
    known = RequestState(
        mood=state.mood[rows],
        following=state.following[rows, shown.author],
        views=state.views[rows, shown.author],
        session_position=state.position[rows],
    )
    allowed = allowed_interactions(on_air, known.following)
    factors, context = visit_factors(world, shown, known)
    inclination = world.users.inclination(shown.domain, shown.user)
    logits = log_odds(factors, context, shown.scene, inclination.T, weights_of(world.config.conflict))
    if world.config.lookahead:
        live = np.flatnonzero(on_air)
        taste = world.users.topic_taste[shown.user[live]]
        add_lookahead(logits, world.items, taste, live, shown.item[live], shown.time_ms[live])
    probabilities = behaviour_probabilities(logits, allowed)
    items = world.items
    # of a room, the time until it closes; of a video, its whole length
    left = items.end_ms[shown.item] - np.where(on_air, shown.time_ms, items.start_ms[shown.item])
    outcome = draw_outcome(rng, probabilities, visit_thresholds(on_air, left), on_air, late_share)

    visits = {
        # unique without a global counter, so that blocks of users are independent
        "visit_id": (shown.user << 24) + state.exposures[rows],
        "user_id": shown.user,
        "author_id": shown.author,
        "item_id": shown.item,
        "domain": shown.domain,
        "request_ms": shown.time_ms,
        "play_ms": outcome.play_ms,
        "scene": shown.scene,
        "position": np.minimum(1 + known.session_position, POSITIONS),
        "delay": outcome.delay,
        "truth": probabilities.marginal,
        **vars(known),
    }
    state.record_outcomes(rows, shown.author, outcome.delay)
    state.now_ms[rows] = shown.time_ms + outcome.play_ms + rng.integers(*PAUSE_MS, len(rows))
    return visits


def _draw_exposures(
    world: SimulatedWorld, state: UserState, rows: np.ndarray, rng: np.random.Generator
) -> ExposureStep:
    """Draw the item that each of the users ``rows [n]`` is shown at the user's own time."""
    user, now = state.user[rows], state.now_ms[rows]
    uniform = rng.random((2, len(rows)))
    is_live_slot = uniform[0] < LIVE_SHARE
    video_scene, live_scene = (edges.searchsorted(uniform[1], side="right") for edges in SCENE_EDGES)
    scene = np.where(is_live_slot, live_scene, video_scene)
    item = np.full(len(rows), -1)

    def fill(domain: int, at: np.ndarray) -> None:
        familiar = state.familiar[rng.integers(0, FAMILIAR_AUTHORS, (FAMILIAR[domain], len(at))), rows[at]]
        mood = state.mood[rows[at]]
        item[at] = choose_items(
            world.candidate_index, world.users, rng, domain, user[at], now[at], scene[at], mood, familiar
        )

    fill(LIVE, np.flatnonzero(is_live_slot))
    # a live slot without an open room shows a video; the plaza has no videos, so such a slot moves to the feed
    rest = np.flatnonzero(item < 0)
    scene[rest[scene[rest] == PLAZA]] = FEED
    fill(VIDEO, rest)
    domain = np.where(item >= world.items.videos, LIVE, VIDEO)
    return ExposureStep(rows, user, now, scene, domain, item, world.items.author[item])


def visits_at(visits: VisitColumns, rows: np.ndarray) -> tuple[ExposureStep, RequestState]:
    """Return the exposures of the visits ``rows [n]``, and the states of their users at the requests.

    The ``rows`` of the exposures are positions among them, 0 to n - 1.
    """
    names = ("user_id", "request_ms", "scene", "domain", "item_id", "author_id")
    shown = ExposureStep(np.arange(len(rows)), *(visits[name][rows] for name in names))
    return shown, RequestState(**{name: visits[name][rows] for name in RequestState.__dataclass_fields__})


def allowed_interactions(on_air: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Return 0 for interactions that cannot happen, a gift for a video and following again, else 1.

    ``on_air [n] bool``, ``following [n] bool`` -> ``[4, n] float32``.
    """
    allowed = np.ones((INTERACTIONS.stop - INTERACTIONS.start, len(on_air)), np.float32)
    allowed[GIFT - INTERACTIONS.start] = on_air
    allowed[FOLLOW - INTERACTIONS.start] = ~following
    return allowed


def visit_factors(world: SimulatedWorld, shown: ExposureStep, known: RequestState) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``FACTORS`` of each exposure, ``[factors, n] float32``, and its context, ``[n]``.

    A context is a position in ``behaviours.CONTEXTS``.
    """
    users, items = world.users, world.items
    user, item = shown.user, shown.item
    interest, vector = users.interest(shown.domain, user), items.vector.take(item, axis=0)
    genre = items.genre[item]
    category = genre // GENRES_PER_CATEGORY
    context = np.where(shown.domain == LIVE, 1 + category, 0)
    factors = {
        name: scale * np.einsum("nd,nd->n", interest[:, part], vector[:, part]) for name, part, scale in SUBSPACES
    }
    factors |= {
        "constant": np.float32(1),
        "mood": genre == known.mood,
        "following": known.following,
        "repeat": REPEAT_OF_VIEWS.take(known.views),
        "novelty": users.novelty[user] * (known.views == 0),
        "quality": items.quality[item],
        "bait": items.bait[item],
        "warmth": world.authors.warmth[shown.author],
        "popularity": items.popularity[item],
        "category": users.category_interest[user, category],
        "hour": world.category_hour[context, local_hour(shown.time_ms)],
        "fatigue": np.log1p(known.session_position, dtype=np.float32),
        "generosity": users.trait[LIVE, :, GIFT][user] * known.following,
    }
    matrix = np.zeros((len(FACTORS), len(user)), np.float32)
    for name, values in factors.items():
        matrix[ROW[name]] = values
    # the factors of segments are 0 for videos
    on_air = np.flatnonzero(context)
    segment = items.segment(item[on_air], shown.time_ms[on_air])
    intensity = items.intensity[segment]
    matrix[ROW["intensity"], on_air] = intensity
    matrix[ROW["topic"], on_air] = intensity * users.topic_taste[user[on_air], items.topic[segment]]
    matrix[ROW["quiet"], on_air] = 1 - intensity
    return matrix, context
