"""State of users that changes while they watch: followed and familiar authors, mood, clock and session."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import EFFECTIVE_VIEW, FOLLOW
from trainer.data.simulator.config import START_MS
from trainer.data.simulator.content import LIVE
from trainer.data.simulator.population import GENRES, TASTE, Users
from trainer.data.simulator.world import SimulatedWorld

FAMILIAR_AUTHORS = 16
"""Number of familiar authors per user: the latest ones that the user followed or watched."""
AUTHORS_MET, FIRST_FOLLOWS, MOST_FIRST_VIEWS = 40, 6, 5
"""State before the log starts: authors that a user met, authors that the user follows, and most views of a familiar
author."""
NEW_MOOD, RANDOM_MOOD = 0.5, 0.15
"""Probability that a new session has a new mood, and that this mood is a random genre instead of a favourite."""


@dataclass(frozen=True)
class UserState:
    """State of a block of ``n`` users. The arrays change in place.

    Attributes:
        user: ``[n] int64`` ids.
        following: ``[n, authors] bool``.
        views: ``[n, authors] uint8``, effective views in both domains; counts stop at 255.
        familiar: ``[FAMILIAR_AUTHORS, n] int64`` authors.
        oldest: ``[n] int64``, row of ``familiar`` that the next familiar author replaces.
        mood: ``[n] int64``, genre that the user currently prefers.
        now_ms: ``[n] int64``, time at which the user is ready for the next exposure.
        session: ``[n] int64``, index of the session within the day, -1 before the first.
        position: ``[n] int64``, number of earlier exposures in the session.
        exposures: ``[n] int64``, number of exposures since the start of the log.
    """

    user: np.ndarray
    following: np.ndarray
    views: np.ndarray
    familiar: np.ndarray
    oldest: np.ndarray
    mood: np.ndarray
    now_ms: np.ndarray
    session: np.ndarray
    position: np.ndarray
    exposures: np.ndarray

    def enter_session(
        self, users: Users, rows: np.ndarray, session: np.ndarray, start_ms: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Move users to a session of their day; a new session may change the mood.

        Args:
            users: the users of the world.
            rows: ``[m]`` rows of this block, each at most once.
            session: ``[m] int64`` index of each user's session within the day.
            start_ms: ``[m] int64`` earliest start of that session.
            rng: random stream.
        """
        fresh = session != self.session[rows]
        self.session[rows] = session
        self.position[rows] = np.where(fresh, 0, self.position[rows] + 1)
        self.now_ms[rows] = np.maximum(self.now_ms[rows], start_ms)
        beginner = rows[fresh]
        uniform = rng.random((3, len(beginner)))
        favourite = users.favourites[self.user[beginner], (3 * uniform[1]).astype(np.int64)]
        mood = np.where(uniform[2] < RANDOM_MOOD, (GENRES * uniform[1]).astype(np.int64), favourite)
        self.mood[beginner] = np.where(uniform[0] < NEW_MOOD, mood, self.mood[beginner])

    def record_outcomes(self, rows: np.ndarray, author: np.ndarray, delay: np.ndarray) -> None:
        """Update the state with the outcome of one exposure of each of the users ``rows [m]``.

        An effective view or a follow makes the author familiar. A follow lasts.

        Args:
            rows: ``[m]`` rows of this block, each at most once.
            author: ``[m] int64`` author of the item shown.
            delay: ``[behaviours, m]`` from request to the first behaviour, -1 for never.
        """
        followed, watched = delay[FOLLOW] >= 0, delay[EFFECTIVE_VIEW] >= 0
        known = np.flatnonzero(followed | watched)
        self.following[rows[followed], author[followed]] = True
        pairs = rows[watched], author[watched]
        # a uint8 count must not wrap around
        self.views[pairs] = np.minimum(self.views[pairs], 254) + 1
        user, oldest = rows[known], self.oldest[rows[known]]
        self.familiar[oldest, user] = author[known]
        self.oldest[user] = (oldest + 1) % FAMILIAR_AUTHORS
        self.exposures[rows] += 1


def initial_user_state(world: SimulatedWorld, user: np.ndarray, rng: np.random.Generator) -> UserState:
    """Return the state of users when the log starts.

    Users have met some authors, popular ones more often. They know and follow those that match their taste best.
    """
    authors, n = world.authors, len(user)
    weight = np.cumsum(np.exp(0.8 * authors.popularity.astype(np.float64)))
    met = np.searchsorted(weight, rng.random((n, AUTHORS_MET)) * weight[-1])
    taste = np.einsum("nd,nmd->nm", world.users.vector[LIVE, user][:, TASTE], authors.vector[met][..., TASTE])
    # of the authors met, those that match the user's taste best
    known = np.take_along_axis(met, np.argsort(-taste, axis=1, kind="stable"), axis=1)[:, :FAMILIAR_AUTHORS]
    state = UserState(
        user=user,
        following=np.zeros((n, len(authors.genre)), bool),
        views=np.zeros((n, len(authors.genre)), np.uint8),
        familiar=np.ascontiguousarray(known.T),
        oldest=np.full(n, FIRST_FOLLOWS),
        mood=world.users.favourites[user, 0],
        now_ms=np.full(n, START_MS),
        session=np.full(n, -1),
        position=np.zeros(n, np.int64),
        exposures=np.zeros(n, np.int64),
    )
    state.following[np.arange(n)[:, None], known[:, :FIRST_FOLLOWS]] = True
    state.views[np.arange(n)[:, None], known] = rng.integers(0, MOST_FIRST_VIEWS + 1, known.shape)
    return state
