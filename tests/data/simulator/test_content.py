"""Rooms of a simulated world: authors who open their first room later."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.simulator.config import DAY_MS, START_MS, WorldConfig
from trainer.data.simulator.content import Items, make_items
from trainer.data.simulator.population import Authors, make_authors, make_genres

USERS, DAYS = 3000, 6


def rooms(seed: int, newcomers: float) -> tuple[Authors, Items]:
    config = WorldConfig(USERS, DAYS, seed, newcomers=newcomers)
    authors = make_authors(config, make_genres(config))
    return authors, make_items(config, authors)


def first_rooms(items: Items) -> dict[int, int]:
    """Return author -> day of the first room."""
    found: dict[int, int] = {}
    for author, start in zip(items.author[items.videos :], items.start_ms[items.videos :], strict=True):
        found.setdefault(int(author), int((start - START_MS) // DAY_MS))
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_newcomers_open_their_first_room_on_a_day_of_the_log(seed: int) -> None:
    all_at_once, later = first_rooms(rooms(seed, 0.0)[1]), first_rooms(rooms(seed, 1.0)[1])
    # Habits differ from author to author, and few authors wait for the third day.
    assert np.mean([day >= 3 for day in all_at_once.values()]) < 0.05
    days = np.bincount([max(0, day) for day in later.values()], minlength=DAYS)
    # An author whose last days have no room is not there; the others are spread over the days.
    assert len(later) > 0.8 * len(all_at_once) and days[3:].sum() > 0.35 * days.sum()
    half = first_rooms(rooms(seed, 0.5)[1])
    share = np.mean([half.get(author, DAYS) > all_at_once[author] + 1 for author in all_at_once])
    assert 0.2 < share < 0.5


def test_rooms_of_newcomers_are_those_without_the_option() -> None:
    (authors, plain), (_, items) = rooms(3, 0.0), rooms(3, 0.7)
    every, kept = (
        {tuple(room) for room in np.column_stack([found.author, found.start_ms, found.end_ms])[found.videos :].tolist()}
        for found in (plain, items)
    )
    assert kept < every and len(kept) < 0.9 * len(every)
    assert items.videos == plain.videos and (items.start_ms[: items.videos] == plain.start_ms[: plain.videos]).all()
    # The first live author is on air from the first day on.
    first = int(np.flatnonzero(authors.goes_live)[0])
    assert first_rooms(items)[first] <= 0
