"""The state of users that changes as they watch: whom they follow and know, what they are after, where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.behaviours import EFFECTIVE_VIEW, FOLLOW
from trainer.data.simulator.config import START_MS
from trainer.data.simulator.content import LIVE
from trainer.data.simulator.population import GENRES, TASTE, Users
from trainer.data.simulator.world import World

ACQUAINTANCES = 16
"""Authors that come to a user's mind: the latest ones followed or watched."""
MET, FIRST_FOLLOWS, MOST_FIRST_VIEWS = 40, 6, 5
"""Before the log: authors a user came across, those followed, and how often the acquaintances were watched at most."""
WANDER, SURPRISE = 0.5, 0.15
"""Chance that a new session brings a new mood, and that the new mood is any genre, not one of the user's favourites."""


@dataclass(frozen=True)
class Memory:
    """A block of ``n`` users; the arrays change in place.

    Attributes:
        user: ``[n] int64`` ids.
        following: ``[n, authors] bool``.
        views: ``[n, authors] uint8``, effective views of both domains.
        familiar: ``[ACQUAINTANCES, n] int64`` authors.
        oldest: ``[n] int64``, which acquaintance makes room for the next one.
        mood: ``[n] int64``, the genre a user is after.
        now_ms: ``[n] int64``, when the user is ready for the next exposure.
        session: ``[n] int64``, which of the day's sessions, -1 before the first.
        position: ``[n] int64``, exposures earlier in the session.
        exposures: ``[n] int64``, since the start of the log.
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
        self, users: Users, who: np.ndarray, session: np.ndarray, start_ms: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Users ``who [m]`` are in a session that could begin at ``start_ms [m]``; a new one may bring a new mood."""
        fresh = session != self.session[who]
        self.session[who] = session
        self.position[who] = np.where(fresh, 0, self.position[who] + 1)
        self.now_ms[who] = np.maximum(self.now_ms[who], start_ms)
        beginner = who[fresh]
        uniform = rng.random((3, len(beginner)))
        favourite = users.favourites[self.user[beginner], (3 * uniform[1]).astype(np.int64)]
        mood = np.where(uniform[2] < SURPRISE, (GENRES * uniform[1]).astype(np.int64), favourite)
        self.mood[beginner] = np.where(uniform[0] < WANDER, mood, self.mood[beginner])

    def remember(self, who: np.ndarray, author: np.ndarray, delay: np.ndarray) -> None:
        """What came of an exposure of each of the users ``who [m]``: ``delay [behaviours, m]``, -1 for never.

        Effective views and follows make an author known; a follow lasts.
        """
        followed, watched = delay[FOLLOW] >= 0, delay[EFFECTIVE_VIEW] >= 0
        known = np.flatnonzero(followed | watched)
        self.following[who[followed], author[followed]] = True
        at = who[watched], author[watched]
        self.views[at] = np.minimum(self.views[at], 254) + 1
        user, oldest = who[known], self.oldest[who[known]]
        self.familiar[oldest, user] = author[known]
        self.oldest[user] = (oldest + 1) % ACQUAINTANCES
        self.exposures[who] += 1


def first_memory(world: World, user: np.ndarray, rng: np.random.Generator) -> Memory:
    """The state of users when the log starts: they follow whom they like best among some popular authors."""
    authors, n = world.authors, len(user)
    weight = np.cumsum(np.exp(0.8 * authors.popularity.astype(np.float64)))
    met = np.searchsorted(weight, rng.random((n, MET)) * weight[-1])
    taste = np.einsum("nd,nmd->nm", world.users.vector[LIVE, user][:, TASTE], authors.vector[met][..., TASTE])
    known = np.take_along_axis(met, np.argsort(-taste, axis=1, kind="stable"), axis=1)[:, :ACQUAINTANCES]
    memory = Memory(
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
    memory.following[np.arange(n)[:, None], known[:, :FIRST_FOLLOWS]] = True
    memory.views[np.arange(n)[:, None], known] = rng.integers(0, MOST_FIRST_VIEWS + 1, known.shape)
    return memory
