"""Texts of the videos, rooms, segments and authors of a world."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trainer.data.simulator.population import CATEGORIES, GENRES_PER_CATEGORY
from trainer.data.simulator.words import (
    AUTHOR_MARKS,
    BANDS,
    SEGMENT_SPEECH,
    TOPIC_WORDS,
    VIDEO_MARKS,
    VOLUME,
    join_words,
    pick_words,
    quality_band,
    topic_words,
)
from trainer.data.simulator.world import SimulatedWorld

WORDING_NOISE = 0.25
"""Standard deviation of the noise between the quality of a video, or the warmth of an author, and its words."""
SEGMENTS_AT_ONCE = 1 << 20


def text_tables(world: SimulatedWorld) -> Iterator[tuple[str, pa.Table]]:
    """Yield the tables ``items``, ``authors`` and ``segments`` of ``text_schema``; ``segments`` comes in parts."""
    yield "items", item_texts(world)
    yield "authors", author_texts(world)
    for first in range(0, len(world.items.topic), SEGMENTS_AT_ONCE):
        yield "segments", segment_texts(world, first, min(first + SEGMENTS_AT_ONCE, len(world.items.topic)))


def item_texts(world: SimulatedWorld) -> pa.Table:
    """Return the titles of videos and rooms, as ``text_schema.ITEMS``.

    A title has a word for the quality, the kind of item (clip or live show) and two words of the genre. The tag is the
    name of the genre.
    """
    items, rng = world.items, world.config.generator("item texts")
    n = len(items.author)
    item = np.arange(n)
    uniform = rng.random((3, n))
    # quality is the author's plus the item's deviation, so its variance is 1.16; quality_band expects 1
    band = quality_band(items.quality / 1.08 + WORDING_NOISE * rng.standard_normal(n))
    room = (item >= items.videos).astype(np.int64)
    return pa.table(
        {
            "item_id": item,
            "author_id": items.author,
            "domain": room.astype(np.int8),
            "duration_ms": np.where(room, 0, items.end_ms - items.start_ms),
            "tag": pick_words(TOPIC_WORDS[:, :1], items.genre, np.zeros(n)),
            "text": join_words(
                pick_words(VIDEO_MARKS, band, uniform[0]),
                pick_words([["clip of"], ["live show of"]], room, np.zeros(n)),
                topic_words(items.genre, uniform[1:]),
            ),
        }
    )


def author_texts(world: SimulatedWorld) -> pa.Table:
    """Return the profiles of authors: words for warmth, category and genre."""
    authors, rng = world.authors, world.config.generator("author texts")
    n = len(authors.genre)
    uniform = rng.random((2, n))
    band = quality_band(authors.warmth + WORDING_NOISE * rng.standard_normal(n))
    text = join_words(
        pick_words(AUTHOR_MARKS, band, uniform[0]),
        pick_words(
            [[f"{name} host , all about"] for name in CATEGORIES], authors.genre // GENRES_PER_CATEGORY, np.zeros(n)
        ),
        pick_words(TOPIC_WORDS[:, :1], authors.genre, np.zeros(n)),
        pick_words(TOPIC_WORDS, authors.genre, uniform[1]),
    )
    return pa.table({"author_id": np.arange(n), "text": text})


def segment_texts(world: SimulatedWorld, first: int, last: int) -> pa.Table:
    """Return the speech of the segments at positions ``first`` to ``last`` (excluded) of the world's columns."""
    items, rng = world.items, world.config.generator("segment texts", first)
    position = np.arange(first, last)
    times = items.segment_times(first, last)
    uniform = rng.random((2, len(position)))
    volume = np.minimum((items.intensity[position] * BANDS).astype(np.int64), BANDS - 1)
    text = join_words(
        pick_words([[word] for word in VOLUME], volume, np.zeros(len(position))),
        pick_words(SEGMENT_SPEECH, items.topic[position], uniform[0]),
        pick_words(TOPIC_WORDS, items.genre[times["item_id"]], uniform[1]),
    )
    return pa.table({**times, "text": text})
