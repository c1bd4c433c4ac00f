"""State of a simulated world before its first exposure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.content import Items, make_items
from trainer.data.simulator.exposure import CandidateIndex, make_candidate_index
from trainer.data.simulator.population import CATEGORIES, Authors, Users, make_authors, make_genres, make_users


@dataclass(frozen=True)
class SimulatedWorld:
    """Users, authors and items of a world, with the indices of the exposure policy.

    Attributes:
        config: parameters of the world.
        users: interests and traits of the users.
        authors: genres and traits of the authors.
        items: videos and rooms.
        candidate_index: indices over the items.
        category_hour: ``[1 + categories, 24] float32``, effect of the hour on live rooms of a category; row 0, for
            videos, is 0.
    """

    config: WorldConfig
    users: Users
    authors: Authors
    items: Items
    candidate_index: CandidateIndex
    category_hour: np.ndarray


def make_world(config: WorldConfig) -> SimulatedWorld:
    """Draw a world. Every part has a random stream of its own."""
    genres = make_genres(config)
    authors = make_authors(config, genres)
    items = make_items(config, authors)
    phase = config.generator("hours").uniform(0, 24, (len(CATEGORIES), 1))
    wave = np.cos((np.arange(24) - phase) * 2 * np.pi / 24)
    return SimulatedWorld(
        config=config,
        users=make_users(config, genres),
        authors=authors,
        items=items,
        candidate_index=make_candidate_index(config, items),
        category_hour=np.concatenate([np.zeros((1, 24)), wave]).astype(np.float32),
    )
