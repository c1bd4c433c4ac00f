"""A stream of exposures in which rooms live for a short while and authors come and go, with planted effects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

N_DENSE = 4
_BIAS, _DENSE, _AUTHOR, _ROOM = -1.5, 0.5, 0.8, 0.6
"""Logit: the constant, each dense feature's weight, and the deviations of authors' and rooms' effects."""


@dataclass(frozen=True)
class StepExposures:
    """Rows of one step.

    Attributes:
        room, author: ``[rows]`` int64, their numbers from 0 on, in no order of time.
        dense: ``[rows, N_DENSE]`` float32.
        label: ``[rows]`` float32, 0 or 1.
        probability: ``[rows]`` float64, of a 1.
    """

    room: np.ndarray
    author: np.ndarray
    dense: np.ndarray
    label: np.ndarray
    probability: np.ndarray


class PassingRooms:
    """A stream whose rooms close and whose authors leave.

    Rooms open at a constant rate and close after an exponential time. Their authors are drawn from those who are
    active; each author is active for one stretch of the stream. How often a room is shown is log-normal in the author
    and in the room.

    Args:
        seed: of everything.
        steps: length of the stream.
        rows: exposures of a step.
        rooms: that open in the stream.
        authors: that there are.
        life: mean steps for which a room is open.

    Attributes:
        rooms, authors: as given.
    """

    def __init__(self, seed: int, steps: int, rows: int, rooms: int, authors: int, life: float) -> None:
        random = np.random.default_rng(seed)
        self.rooms, self.authors, self._steps, self._rows = rooms, authors, steps, rows
        opening = np.sort(random.uniform(-life, steps, rooms))
        closing = opening + random.exponential(life, rooms)
        came = random.uniform(-0.3, 1.0, authors) * steps
        left = came + random.exponential(0.3 * steps, authors)
        fame = random.lognormal(0, 1.0, authors)
        self._author = np.empty(rooms, np.int64)
        for room in range(rooms):
            active = np.flatnonzero((came <= opening[room]) & (opening[room] < left))
            self._author[room] = random.choice(active if len(active) else authors)
        self._opening, self._closing = opening, closing
        self._weight = fame[self._author] * random.lognormal(0, 0.8, rooms)
        self._effect = random.normal(0, _AUTHOR, authors)[self._author] + random.normal(0, _ROOM, rooms)
        # Ids are permuted, so that they say nothing about time or author.
        self._room_number, self._author_number = random.permutation(rooms), random.permutation(authors)
        self._random = random

    def __iter__(self) -> Iterator[StepExposures]:
        random, rows = self._random, self._rows
        for step in range(self._steps):
            live = np.flatnonzero((self._opening <= step) & (step < self._closing))
            weight = self._weight[live]
            room = live[random.choice(len(live), rows, p=weight / weight.sum())]
            dense = random.normal(size=(rows, N_DENSE))
            probability = 1 / (1 + np.exp(-(_BIAS + _DENSE * dense.sum(1) + self._effect[room])))
            yield StepExposures(
                self._room_number[room],
                self._author_number[self._author[room]],
                dense.astype(np.float32),
                (random.random(rows) < probability).astype(np.float32),
                probability,
            )
