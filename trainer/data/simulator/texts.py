"""What videos, rooms, their segments and authors of a world say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trainer.data.simulator.config import SEGMENT_MS
from trainer.data.simulator.population import CATEGORIES, GENRES_PER_CATEGORY
from trainer.data.simulator.words import (
    AUTHOR_MARKS,
    BANDS,
    SEGMENT_SPEECH,
    TOPIC_WORDS,
    VIDEO_MARKS,
    VOLUME,
    band_of,
    pick,
    say,
    topic_words,
)
from trainer.data.simulator.world import World

WORDING_NOISE = 0.25
"""Between the quality of a video, or the warmth of an author, and what the words say of it."""
SEGMENTS_AT_ONCE = 1 << 20


def text_tables(world: World) -> Iterator[tuple[str, pa.Table]]:
    """``items``, ``authors`` and ``segments`` of ``text_schema``, the last in parts."""
    yield "items", item_texts(world)
    yield "authors", author_texts(world)
    for first in range(0, len(world.items.topic), SEGMENTS_AT_ONCE):
        yield "segments", segment_texts(world, first, min(first + SEGMENTS_AT_ONCE, len(world.items.topic)))


def item_texts(world: World) -> pa.Table:
    """Titles: how good it looks, two words of the genre; a room's says that it is live. The tag is the genre's name."""
    items, rng = world.items, world.config.generator("item texts")
    n = len(items.author)
    item = np.arange(n)
    uniform = rng.random((3, n))
    # the deviation of an item from its author makes the variance 1.16
    band = band_of(items.quality / 1.08 + WORDING_NOISE * rng.standard_normal(n))
    room = (item >= items.videos).astype(np.int64)
    return pa.table(
        {
            "item_id": item,
            "author_id": items.author,
            "domain": room.astype(np.int8),
            "duration_ms": np.where(room, 0, items.end_ms - items.start_ms),
            "tag": pick(TOPIC_WORDS[:, :1], items.genre, np.zeros(n)),
            "text": say(
                pick(VIDEO_MARKS, band, uniform[0]),
                pick([["clip of"], ["live show of"]], room, np.zeros(n)),
                topic_words(items.genre, uniform[1:]),
            ),
        }
    )


def author_texts(world: World) -> pa.Table:
    """Profiles: how warm they are, their category and genre."""
    authors, rng = world.authors, world.config.generator("author texts")
    n = len(authors.genre)
    uniform = rng.random((2, n))
    band = band_of(authors.warmth + WORDING_NOISE * rng.standard_normal(n))
    text = say(
        pick(AUTHOR_MARKS, band, uniform[0]),
        pick([[f"{name} host , all about"] for name in CATEGORIES], authors.genre // GENRES_PER_CATEGORY, np.zeros(n)),
        pick(TOPIC_WORDS[:, :1], authors.genre, np.zeros(n)),
        pick(TOPIC_WORDS, authors.genre, uniform[1]),
    )
    return pa.table({"author_id": np.arange(n), "text": text})


def segment_texts(world: World, first: int, last: int) -> pa.Table:
    """What is said in the segments at positions ``first`` to ``last`` of the world's columns."""
    items, rng = world.items, world.config.generator("segment texts", first)
    at = np.arange(first, last)
    item = np.searchsorted(items.first_segment, at, side="right") - 1
    segment = at - items.first_segment[item]
    uniform = rng.random((2, len(at)))
    volume = np.minimum((items.intensity[at] * BANDS).astype(np.int64), BANDS - 1)
    text = say(
        pick([[word] for word in VOLUME], volume, np.zeros(len(at))),
        pick(SEGMENT_SPEECH, items.topic[at], uniform[0]),
        pick(TOPIC_WORDS, items.genre[item], uniform[1]),
    )
    start_ms = items.start_ms[item] + segment * SEGMENT_MS
    return pa.table({"item_id": item, "segment": segment.astype(np.int32), "start_ms": start_ms, "text": text})
