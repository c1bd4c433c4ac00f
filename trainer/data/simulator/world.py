"""A world before its first exposure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.content import Items, make_items
from trainer.data.simulator.exposure import Catalogue, make_catalogue
from trainer.data.simulator.population import CATEGORIES, Authors, Users, make_authors, make_genres, make_users


@dataclass(frozen=True)
class World:
    """Who lives there and what will be on air when.

    Attributes:
        config: what it was made from.
        users: their interests and traits.
        authors: theirs.
        items: videos and rooms.
        catalogue: indices over the items.
        category_hour: ``[1 + categories, 24] float32``, how well an hour suits live rooms of a category; row 0, for
            videos, is 0.
    """

    config: WorldConfig
    users: Users
    authors: Authors
    items: Items
    catalogue: Catalogue
    category_hour: np.ndarray


def make_world(config: WorldConfig) -> World:
    """Draw a world. Every part has its own random stream."""
    genres = make_genres(config)
    authors = make_authors(config, genres)
    items = make_items(config, authors)
    phase = config.generator("hours").uniform(0, 24, (len(CATEGORIES), 1))
    wave = np.cos((np.arange(24) - phase) * 2 * np.pi / 24)
    return World(
        config=config,
        users=make_users(config, genres),
        authors=authors,
        items=items,
        catalogue=make_catalogue(config, items),
        category_hour=np.concatenate([np.zeros((1, 24)), wave]).astype(np.float32),
    )
