"""Estimates of the hidden state of a simulated world from the past: users, their moods, rooms, and what rooms show.

Each of them is estimated as if all others were known at past visits, and as if the traits of authors were known. So the
estimates are too good: a real model must learn everything at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainer.data.format.text_schema import SEGMENT_MS
from trainer.data.simulator.behaviours import (
    CLICK,
    DEPTH_OFFSET,
    EFFECTIVE_VIEW,
    GIFT,
    INTERACTIONS,
    LONG_VIEW,
    UNCLICKED_OFFSET,
    BehaviourProbabilities,
    behaviour_probabilities,
    log_odds,
    weights_of,
)
from trainer.data.simulator.config import BEHAVIOURS
from trainer.data.simulator.content import INTENSITY_WOBBLE, LIVE, PHASES, TRAIT_SPREAD, VECTOR_SPREAD
from trainer.data.simulator.lookahead import SEGMENTS_AHEAD, add_lookahead, mean_appeal
from trainer.data.simulator.lookahead import WEIGHTS as APPEAL_WEIGHTS
from trainer.data.simulator.population import (
    CATEGORIES,
    DIM,
    GENRES,
    GENRES_PER_CATEGORY,
    TOPICS,
    Users,
    make_genres,
    make_users,
)
from trainer.data.simulator.segment_truth import PHASE_RULES, phase_begins
from trainer.data.simulator.user_days import (
    ROW,
    SUBSPACES,
    ExposureStep,
    allowed_interactions,
    simulate_visits,
    visit_factors,
    visits_at,
)
from trainer.data.simulator.user_state import NEW_MOOD, RANDOM_MOOD
from trainer.data.simulator.world import SimulatedWorld

VISITS_AT_ONCE = 1 << 15
CATEGORY_TOPICS = [np.array([TOPICS.index(name) for name, *_ in phases]) for phases in PHASES]
ROOM_TRAITS = DIM + 2
"""Numbers that make a room differ from its author: its vector, quality and bait."""

VECTOR, CATEGORY_INTEREST = slice(0, 2 * DIM), slice(2 * DIM, 2 * DIM + len(CATEGORIES))
TOPIC_TASTE = slice(CATEGORY_INTEREST.stop, CATEGORY_INTEREST.stop + len(TOPICS))
TRAIT = slice(TOPIC_TASTE.stop, TOPIC_TASTE.stop + 2 * len(BEHAVIOURS))
NOVELTY = TRAIT.stop
USER_TRAITS = NOVELTY + 1
"""Numbers of a user, and the parts that they consist of; vector and trait first for videos, then for rooms."""

POPULATION = 20_000
"""Users of the population from which the distribution of the traits is estimated."""
USERS_AT_ONCE = 512


class SimulatedLog:
    """All visits of a world, simulated again, with the state that no log has.

    Args:
        world: the world.

    Attributes:
        world: the world.
        columns: of ``simulate_visits``; the visits of a user are in the order of time.
    """

    def __init__(self, world: SimulatedWorld) -> None:
        self.world = world
        parts = list(simulate_visits(world))
        self.columns = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}

    def happened(self, rows: np.ndarray) -> np.ndarray:
        """Return the behaviours of visits, ``[behaviours, n] bool``."""
        return np.asarray(self.columns["delay"][:, rows] >= 0)

    def inputs(self, rows: np.ndarray) -> VisitInputs:
        """Return what decides the probabilities of visits."""
        shown, known = visits_at(self.columns, rows)
        factors, context = visit_factors(self.world, shown, known)
        trait = self.world.users.inclination(shown.domain, shown.user).T
        allowed = allowed_interactions(shown.domain == LIVE, known.following)
        return VisitInputs(self.world, shown, factors, context, trait, allowed)


@dataclass(frozen=True)
class VisitInputs:
    """Factors that decide the probabilities of ``n`` visits; each can be replaced by another one."""

    world: SimulatedWorld
    shown: ExposureStep
    factors: np.ndarray
    context: np.ndarray
    trait: np.ndarray
    allowed: np.ndarray

    @property
    def topic_taste(self) -> np.ndarray:
        """Return the true tastes of the users for the topics, ``[n, topics] float32``."""
        return self.world.users.topic_taste[self.shown.user]

    def logits(self, ahead: bool = True) -> np.ndarray:
        """Return the log-odds of the behaviours, ``[behaviours, n]``.

        Args:
            ahead: with the effect of the next minutes of a room, if the world has it.
        """
        shown, world = self.shown, self.world
        logits = log_odds(self.factors, self.context, shown.scene, self.trait, weights_of(world.config.conflict))
        if ahead and world.config.lookahead:
            live = np.flatnonzero(shown.domain == LIVE)
            taste = world.users.topic_taste[shown.user[live]]
            add_lookahead(logits, world.items, taste, live, shown.item[live], shown.time_ms[live])
        return logits

    def room_weights(self) -> np.ndarray:
        """Return the weights of standardised room traits in the log-odds, ``[behaviours, ROOM_TRAITS, n] float32``."""
        weight = weights_of(self.world.config.conflict)[self.context].transpose(1, 2, 0)
        interest = self.world.users.interest(self.shown.domain, self.shown.user).T
        found = np.zeros((len(BEHAVIOURS), ROOM_TRAITS, len(self.context)), np.float32)
        for name, part, scale in SUBSPACES:
            found[:, part] = VECTOR_SPREAD * scale * weight[:, ROW[name], None] * interest[part]
        for place, name in enumerate(("quality", "bait"), DIM):
            found[:, place] = TRAIT_SPREAD * weight[:, ROW[name]]
        return found

    def user_weights(self) -> np.ndarray:
        """Return the weights of the users' traits in the log-odds, ``[behaviours, USER_TRAITS, n] float32``."""
        items, shown = self.world.items, self.shown
        weight = weights_of(self.world.config.conflict)[self.context].transpose(1, 2, 0)
        column = np.arange(len(self.context))
        found = np.zeros((len(BEHAVIOURS), USER_TRAITS, len(column)), np.float32)
        vector = items.vector[shown.item]
        for name, part, scale in SUBSPACES:
            for dim in range(part.start, part.stop):
                found[:, shown.domain * DIM + dim, column] = scale * weight[:, ROW[name]] * vector[:, dim]
        category = items.genre[shown.item] // GENRES_PER_CATEGORY
        found[:, CATEGORY_INTEREST.start + category, column] = weight[:, ROW["category"]]
        for k in range(len(BEHAVIOURS)):
            found[k, TRAIT.start + shown.domain * len(BEHAVIOURS) + k, column] = 1
        # An inclination to give counts again towards followed authors.
        found[:, TRAIT.start + LIVE * len(BEHAVIOURS) + GIFT] += (
            weight[:, ROW["generosity"]] * self.factors[ROW["following"]]
        )
        found[:, NOVELTY] = weight[:, ROW["novelty"]] * (self.factors[ROW["repeat"]] == 0)
        live = np.flatnonzero(shown.domain == LIVE)
        content = true_content(self.world, shown.item[live], shown.time_ms[live])
        topic, intensity = content.topic[..., 0].astype(np.int64), content.intensity[..., 0]
        found[:, TOPIC_TASTE.start + topic[0], live] = weight[:, ROW["topic"], live] * intensity[0]
        if self.world.config.lookahead:
            # Appeal is linear in the tastes: the difference that one unit of a taste makes is its weight.
            there = segments_there(self.world, shown.item[live], shown.time_ms[live])
            none = mean_appeal(intensity[1:], np.zeros_like(intensity[1:]), there)
            for taste in range(len(TOPICS)):
                more = mean_appeal(intensity[1:], (topic[1:] == taste).astype(np.float32), there) - none
                for behaviour, slope in APPEAL_WEIGHTS.items():
                    found[behaviour, TOPIC_TASTE.start + taste, live] += np.float32(slope) * more
        return found

    def user_traits(self) -> np.ndarray:
        """Return the true traits of the users, ``[USER_TRAITS, n] float32``."""
        return user_traits(self.world.users)[self.shown.user].T

    def room_traits(self) -> np.ndarray:
        """Return the true traits of the rooms, standardised, ``[ROOM_TRAITS, n] float32``."""
        items, authors, item, author = self.world.items, self.world.authors, self.shown.item, self.shown.author
        vector = (items.vector[item] - authors.vector[author]).T / np.float32(VECTOR_SPREAD)
        others = [
            (getattr(items, name)[item] - getattr(authors, name)[author]) / np.float32(TRAIT_SPREAD)
            for name in ("quality", "bait")
        ]
        return np.concatenate([vector, others])


def mood_probability(log: SimulatedLog) -> np.ndarray:
    """Return the probability that a visit's genre is the user's mood, given the user's earlier visits; ``[visits]``.

    A Bayes filter over all genres. It knows the first mood, the favourites, the sessions and what users did; it does
    not use which items they were shown.
    """
    columns, world = log.columns, log.world
    n = len(columns["user_id"])
    gain = np.empty(n)
    for first in range(0, n, VISITS_AT_ONCE):
        rows = np.arange(first, min(first + VISITS_AT_ONCE, n))
        inputs, happened = log.inputs(rows), log.happened(rows)
        likelihood = []
        for match in (0, 1):
            inputs.factors[ROW["mood"]] = match
            likelihood.append(log_likelihood(behaviour_probabilities(inputs.logits(), inputs.allowed), happened))
        gain[rows] = likelihood[1] - likelihood[0]
    genre = world.items.genre[columns["item_id"]]
    begins = columns["session_position"] == 0

    favourites = world.users.favourites
    users = np.arange(len(favourites))[:, None]
    fresh = np.full((len(favourites), GENRES), RANDOM_MOOD / GENRES)
    np.add.at(fresh, (users, favourites), (1 - RANDOM_MOOD) / favourites.shape[1])
    belief = np.zeros((len(favourites), GENRES))
    belief[users[:, 0], favourites[:, 0]] = 1
    found = np.empty(n)
    for rows in _by_turn(columns["user_id"]):
        user, own = columns["user_id"][rows], genre[rows]
        now = belief[user]
        now = np.where(begins[rows, None], NEW_MOOD * fresh[user] + (1 - NEW_MOOD) * now, now)
        place = np.arange(len(rows))
        found[rows] = now[place, own]
        now[place, own] *= np.exp(gain[rows])
        belief[user] = now / now.sum(axis=1, keepdims=True)
    return found


def log_likelihood(probabilities: BehaviourProbabilities, happened: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probability of what happened in each visit; ``happened [behaviours, n] bool``."""
    click, effective, long = happened[CLICK], happened[EFFECTIVE_VIEW], happened[LONG_VIEW]
    branch, column = click.astype(np.int64), np.arange(len(click))
    found = _log(probabilities.click, click)
    found += _log(probabilities.effective[branch, column], effective)
    found += np.where(effective, _log(probabilities.long[branch, column], long), 0)
    acted = probabilities.interaction[effective.astype(np.int64) + long, :, column].T
    found += np.where(click, _log(acted, happened[INTERACTIONS]).sum(axis=0), 0)
    return found


def _log(probability: np.ndarray, happened: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.where(happened, probability, 1 - probability), 1e-12, dtype=np.float64))


@dataclass(frozen=True)
class TraitBelief:
    """Normal distributions of the traits of ``n`` users or rooms.

    Attributes:
        mean: ``[n, traits]``.
        covariance: ``[n, traits, traits]``.
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __getitem__(self, rows: slice) -> TraitBelief:
        return TraitBelief(self.mean[rows], self.covariance[rows])

    def draw(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        """Draw traits, ``[n, draws, traits] float32``."""
        traits = self.mean.shape[1]
        # Rounding could make an eigenvalue of a covariance slightly negative.
        root = np.linalg.cholesky(self.covariance.astype(np.float64) + 1e-6 * np.eye(traits))
        normal = rng.standard_normal((len(self.mean), draws, traits))
        drawn: np.ndarray = self.mean[:, None] + normal @ root.transpose(0, 2, 1)
        return drawn.astype(np.float32)

    def keep(self, rows: np.ndarray, other: TraitBelief, of: np.ndarray) -> None:
        """Set ``rows [m]`` to the distributions ``of [m]`` of another belief."""
        self.mean[rows], self.covariance[rows] = other.mean[of], other.covariance[of]

    def observe(
        self, own: np.ndarray, base: np.ndarray, weights: np.ndarray, happened: np.ndarray, allowed: np.ndarray
    ) -> None:
        """Learn from one visit of each of ``own [m]``, by an extended Kalman filter.

        Each behaviour is an observation whose log-odds are linear in the traits, and whose variance is that of the
        probability at the mean.

        Args:
            own: positions in this belief, each at most once.
            base: ``[behaviours, m]`` log-odds with traits of 0.
            weights: ``[behaviours, traits, m]`` of the traits in the log-odds.
            happened: ``[behaviours, m] bool``.
            allowed: ``[interactions, m]``, 0 for an interaction that cannot happen.
        """
        for k in range(len(BEHAVIOURS)):
            offset, open_to = _branch(k, happened, allowed)
            visit = np.flatnonzero(open_to)
            one, slope = own[visit], weights[k][:, visit].T
            odds = base[k, visit] + offset[visit] + np.einsum("nt,nt->n", slope, self.mean[one])
            probability = 1 / (1 + np.exp(-odds))
            variance = probability * (1 - probability)
            covariance = self.covariance[one]
            spread = np.einsum("nts,ns->nt", covariance, slope)
            scale = 1 / (1 + variance * np.einsum("nt,nt->n", slope, spread))
            self.mean[one] += spread * (scale * (happened[k, visit] - probability))[:, None]
            covariance -= ((variance * scale)[:, None] * spread)[:, :, None] * spread[:, None]
            self.covariance[one] = covariance


def user_traits(users: Users) -> np.ndarray:
    """Return all numbers of each user that the log-odds are linear in, ``[users, USER_TRAITS] float32``."""
    parts = [*users.vector, users.category_interest, users.topic_taste, *users.trait, users.novelty[:, None]]
    return np.concatenate(parts, axis=1)


def user_beliefs(log: SimulatedLog, rows: np.ndarray) -> TraitBelief:
    """Return what users' earlier visits reveal of the users' traits at the requests of the live visits ``rows [n]``.

    Before the first visit, the favourite genres and the side features of a user are known, and how the traits of a
    large population depend on them.
    """
    columns, world = log.columns, log.world
    prior = _user_prior(world)
    wanted = np.full(len(columns["user_id"]), -1)
    wanted[rows] = np.arange(len(rows))
    asking = np.bincount(columns["user_id"][rows], minlength=world.config.users) > 0
    found = TraitBelief(
        np.empty((len(rows), USER_TRAITS), np.float32), np.empty((len(rows), USER_TRAITS, USER_TRAITS), np.float32)
    )
    for first in range(0, world.config.users, USERS_AT_ONCE):
        belief = prior[first : first + USERS_AT_ONCE]
        visits = np.flatnonzero(
            asking[columns["user_id"]] & (columns["user_id"] // USERS_AT_ONCE == first // USERS_AT_ONCE)
        )
        for turn in _by_turn(columns["user_id"][visits]):
            at = visits[turn]
            own = columns["user_id"][at] - first
            asked = wanted[at] >= 0
            found.keep(wanted[at[asked]], belief, own[asked])
            inputs, happened = log.inputs(at), log.happened(at)
            weights = inputs.user_weights()
            base = inputs.logits() - np.einsum("ktn,tn->kn", weights, inputs.user_traits())
            belief.observe(own, base, weights, happened, inputs.allowed)
    return found


def _user_prior(world: SimulatedWorld) -> TraitBelief:
    """Return the distributions of the users' traits before their first visits."""
    many = make_users(replace(world.config, users=POPULATION), make_genres(world.config))

    def known(users: Users) -> np.ndarray:
        columns = [users.favourites[:, place] for place in range(users.favourites.shape[1])]
        sizes = [GENRES] * len(columns)
        for name, values in users.side.items():
            columns.append(values)
            sizes.append(1 + int(many.side[name].max()))
        parts = [np.eye(size, dtype=np.float32)[column] for column, size in zip(columns, sizes, strict=True)]
        return np.concatenate([*parts, np.ones((len(columns[0]), 1), np.float32)], axis=1)

    inputs, traits = known(many), user_traits(many)
    # Each group of columns sums up to one, so the solution is not unique; the smallest one is taken.
    slopes = np.linalg.lstsq(inputs, traits, rcond=None)[0]
    covariance = np.cov((traits - inputs @ slopes).T).astype(np.float32)
    mean = (known(world.users) @ slopes).astype(np.float32)
    return TraitBelief(mean, np.tile(covariance, (len(mean), 1, 1)))


def room_beliefs(log: SimulatedLog, rows: np.ndarray) -> TraitBelief:
    """Return what ended visits to rooms reveal of their traits at the requests of the live visits ``rows [n]``."""
    columns = log.columns
    visits = np.flatnonzero(np.isin(columns["item_id"], np.unique(columns["item_id"][rows])))
    room = np.unique(columns["item_id"][visits], return_inverse=True)[1]
    inputs, happened = log.inputs(visits), log.happened(visits)
    weights = inputs.room_weights().astype(np.float64)
    base = inputs.logits() - np.einsum("ktn,tn->kn", weights, inputs.room_traits())

    wanted = np.full(len(visits), -1)
    place = np.searchsorted(visits, rows)
    wanted[place] = np.arange(len(rows))
    request_ms = columns["request_ms"][visits]
    targets = np.flatnonzero(wanted >= 0)
    # The end of a visit goes before a request at the same time: it is in the past of that request.
    event_ms = np.concatenate([request_ms + columns["play_ms"][visits], request_ms[targets]])
    event = np.concatenate([np.arange(len(visits)), targets])
    asks = np.arange(len(event_ms)) >= len(visits)
    order = np.lexsort([asks, event_ms])

    rooms = int(room.max()) + 1 if len(room) else 0
    belief = TraitBelief(np.zeros((rooms, ROOM_TRAITS)), np.tile(np.eye(ROOM_TRAITS), (rooms, 1, 1)))
    found = TraitBelief(np.empty((len(rows), ROOM_TRAITS)), np.empty((len(rows), ROOM_TRAITS, ROOM_TRAITS)))
    for turn in _by_turn(room[event[order]]):
        at = order[turn]
        asked, ended = event[at[asks[at]]], event[at[~asks[at]]]
        found.keep(wanted[asked], belief, room[asked])
        belief.observe(room[ended], base[:, ended], weights[:, :, ended], happened[:, ended], inputs.allowed[:, ended])
    return found


def _branch(k: int, happened: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the offset of the log-odds of behaviour k in each visit, and True where the behaviour could happen."""
    click, effective, long = happened[CLICK], happened[EFFECTIVE_VIEW], happened[LONG_VIEW]
    if k == CLICK:
        return np.zeros(len(click)), np.ones(len(click), bool)
    if k in (EFFECTIVE_VIEW, LONG_VIEW):
        offset = UNCLICKED_OFFSET[(EFFECTIVE_VIEW, LONG_VIEW).index(k), click.astype(np.int64)]
        return offset, effective if k == LONG_VIEW else np.ones(len(click), bool)
    place = k - INTERACTIONS.start
    return DEPTH_OFFSET[effective.astype(np.int64) + long, place], click & (allowed[place] > 0)


@dataclass(frozen=True)
class ContentDraws:
    """Draws of what rooms show at ``n`` requests and in the segments after them, ``[1 + SEGMENTS_AHEAD, n, draws]``."""

    topic: np.ndarray
    intensity: np.ndarray


def segments_there(world: SimulatedWorld, item: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Return False for the segments ahead that come after the end of the room, ``[SEGMENTS_AHEAD, n] bool``."""
    ahead = world.items.segment(item, time_ms) + np.arange(1, SEGMENTS_AHEAD + 1)[:, None]
    there: np.ndarray = ahead < world.items.first_segment[item + 1]
    return there


def true_content(world: SimulatedWorld, item: np.ndarray, time_ms: np.ndarray) -> ContentDraws:
    """Return what the rooms ``item [n]`` show from ``time_ms [n]`` on, as one draw."""
    items = world.items
    segment = items.segment(item, time_ms) + np.arange(1 + SEGMENTS_AHEAD)[:, None]
    segment = np.minimum(segment, len(items.topic) - 1)[..., None]
    return ContentDraws(items.topic[segment], items.intensity[segment])


def draw_content(
    world: SimulatedWorld, item: np.ndarray, time_ms: np.ndarray, draws: int, rng: np.random.Generator
) -> ContentDraws:
    """Draw topics and intensities, from the segment on air on, given the segments that were known at the requests.

    The topic and the intensity of a known segment are known exactly. A phase that is on has lasted for a known time, so
    the distribution of its end is known, too. Its level is the mean of its known segments, with the error of that mean.

    Args:
        world: the world.
        item: ``[n]`` rooms.
        time_ms: ``[n]`` times in them.
        draws: number of draws.
        rng: random stream.
    """
    items, rules = world.items, PHASE_RULES
    segment, first = items.segment(item, time_ms), items.first_segment[item]
    latest = segment - 1
    while True:
        known_ms = items.start_ms[item] + (latest - first + 1) * SEGMENT_MS + items.processing_ms[latest]
        late = (latest >= first) & (known_ms > time_ms)
        if not late.any():
            break
        latest = latest - late
    unknown = latest < first
    begin = phase_begins(items, 0, len(items.topic))[latest]
    lasted = np.where(unknown, 1, 1 + latest - begin)
    total = np.concatenate([[0.0], np.cumsum(items.intensity, dtype=np.float64)])
    level = (total[latest + 1] - total[latest + 1 - lasted]) / lasted

    shape = (len(item), draws)
    topic = np.broadcast_to(items.topic[latest].astype(np.int64)[:, None], shape)
    longest, shortest = rules.longest[topic], np.maximum(rules.shortest[topic], lasted[:, None])
    left = rng.integers(shortest, np.maximum(longest, shortest) + 1) - lasted[:, None]
    level = level[:, None] + INTENSITY_WOBBLE / np.sqrt(lasted[:, None]) * rng.standard_normal(shape)
    level = np.clip(level, rules.low[topic], rules.high[topic])
    # Before its first segment, a room is at the end of a random phase: the one after it is random as well.
    start = _random_topics(items.genre[item] // GENRES_PER_CATEGORY, rng.random(shape))
    topic, left = np.where(unknown[:, None], start, topic), np.where(unknown[:, None], 0, left)

    found = ContentDraws(
        np.zeros((1 + SEGMENTS_AHEAD, *shape), np.int8), np.zeros((1 + SEGMENTS_AHEAD, *shape), np.float32)
    )
    behind = segment - latest
    for step in range(1, int(behind.max(initial=0)) + SEGMENTS_AHEAD + 1):
        ends = left == 0
        topic = np.where(ends, rules.after[topic], topic)
        length = rng.integers(rules.shortest[topic], rules.longest[topic] + 1)
        left = np.where(ends, length, left) - 1
        fresh = rules.low[topic] + (rules.high[topic] - rules.low[topic]) * rng.random(shape)
        level = np.where(ends, fresh, level)
        shown = np.clip(level + INTENSITY_WOBBLE * rng.standard_normal(shape), 0, 1)
        slot = step - behind
        rows = np.flatnonzero((slot >= 0) & (slot <= SEGMENTS_AHEAD))
        found.topic[slot[rows], rows], found.intensity[slot[rows], rows] = topic[rows], shown[rows]
    return found


def _random_topics(category: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return a random topic of each category; ``category [n]``, ``uniform [n, draws]`` -> ``[n, draws]``."""
    found = np.zeros(uniform.shape, np.int64)
    for code, topics in enumerate(CATEGORY_TOPICS):
        rows = category == code
        found[rows] = topics[(uniform[rows] * len(topics)).astype(np.int64)]
    return found


def _by_turn(owner: np.ndarray) -> list[np.ndarray]:
    """Return the positions of the first entries of all owners, then of their second ones, and so on."""
    order = np.argsort(owner, kind="stable")
    ordered = owner[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    turn = np.arange(len(owner)) - np.repeat(begins, np.diff(np.append(begins, len(owner))))
    by_turn = np.argsort(turn, kind="stable")
    return np.split(order[by_turn], np.cumsum(np.bincount(turn))[:-1]) if len(owner) else []
