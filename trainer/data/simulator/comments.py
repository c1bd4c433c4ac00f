"""Comments under the videos of a world: what they are, what they say, and how they gather likes.

Comments are written by others than the simulated users. A comment has a kind, a genre and a quality, and its words say
so, up to some noise. Its likes grow with time towards a number that depends on its quality and its video; they are the
platform's count, of which the simulated users are a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import UNKNOWN_USER
from trainer.data.simulator.config import DAY_MS, WorldConfig
from trainer.data.simulator.population import GENRES
from trainer.data.simulator.words import COMMENT_MARKS, FRAMES, KINDS, band_of, pick, say, topic_words
from trainer.data.simulator.world import World

MEAN_COMMENTS, MOST_COMMENTS = 8.0, 32
"""Of a video of average popularity; and of any video."""
DELAY_MS = DAY_MS // 2
"""Mean time from a video's publication to a comment."""
STRAY = 0.15
"""Chance that a comment is not about the video's genre."""
LIKES_QUALITY, LIKES_POPULARITY, LIKES_NOISE, LIKES_CONSTANT = 1.1, 0.5, 0.5, 2.0
"""The logarithm of the likes that a comment gathers in the end."""
LIKES_MS = DAY_MS
"""After so long a comment has 63 % of them."""
WORDING_NOISE = 0.25
"""Between the quality of a comment and what its words say of it."""


@dataclass(frozen=True)
class Comments:
    """All comments of a world, video after video and in order of time; a comment's id is its position.

    Attributes:
        first: ``[videos + 1] int64`` offsets into the columns.
        item: ``[n] int64``.
        time_ms: ``[n] int64``, when it was written.
        kind: ``[n] int8``, position in ``words.KINDS``.
        genre: ``[n] int64``, what it is about.
        quality: ``[n] float32``, standard normal up to what the video's quality adds.
        likes_in_the_end: ``[n] float32``.
    """

    first: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    kind: np.ndarray
    genre: np.ndarray
    quality: np.ndarray
    likes_in_the_end: np.ndarray

    def likes(self, comment: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
        """Likes that comments have at a time, int64 of the broadcast shape; 0 before they were written."""
        age = np.maximum(time_ms - self.time_ms[comment], 0).astype(np.float32)
        return (self.likes_in_the_end[comment] * -np.expm1(age / np.float32(-LIKES_MS))).astype(np.int64)


def make_comments(world: World) -> Comments:
    """Draw the comments of a world that are written before its end."""
    config, items = world.config, world.items
    rng = config.generator("comments")
    videos = np.arange(items.videos)
    lift = 0.5 * items.popularity[videos] + 0.3 * world.authors.warmth[items.author[videos]] - 0.2
    count = np.minimum(rng.poisson(MEAN_COMMENTS * np.exp(lift)), MOST_COMMENTS)
    item = np.repeat(videos, count)
    time_ms = items.start_ms[item] + rng.exponential(DELAY_MS, len(item)).astype(np.int64)
    item, time_ms = item[time_ms < config.end_ms], time_ms[time_ms < config.end_ms]
    order = np.lexsort((time_ms, item))
    item, time_ms = item[order], time_ms[order]
    n = len(item)
    stray = rng.random(n) < STRAY
    quality = 0.25 * items.quality[item] + rng.standard_normal(n, np.float32)
    log_likes = (
        LIKES_CONSTANT
        + LIKES_POPULARITY * items.popularity[item]
        + LIKES_QUALITY * quality
        + LIKES_NOISE * rng.standard_normal(n, np.float32)
    )
    return Comments(
        first=np.searchsorted(item, np.arange(items.videos + 1)),
        item=item,
        time_ms=time_ms,
        kind=rng.integers(0, len(KINDS), n, dtype=np.int8),
        genre=np.where(stray, rng.integers(0, GENRES, n), items.genre[item]),
        quality=quality,
        likes_in_the_end=np.exp(log_likes).astype(np.float32),
    )


def comment_table(config: WorldConfig, comments: Comments) -> pa.Table:
    """The comments as ``text_schema.COMMENTS``."""
    rng = config.generator("comment texts")
    n = len(comments.item)
    uniform = rng.random((4, n))
    band = band_of(comments.quality + WORDING_NOISE * rng.standard_normal(n))
    text = say(
        pick(COMMENT_MARKS, band, uniform[0]),
        pick([FRAMES[kind] for kind in KINDS], comments.kind, uniform[1]),
        topic_words(comments.genre, uniform[2:]),
    )
    return pa.table(
        {
            "comment_id": np.arange(n),
            "item_id": comments.item,
            "user_id": np.full(n, UNKNOWN_USER),
            "time_ms": comments.time_ms,
            "likes": comments.likes(np.arange(n), np.full(n, config.end_ms)),
            "text": text,
        }
    )


def comment_truth(comments: Comments) -> pa.Table:
    """What no text says for certain, as ``text_schema.COMMENT_TRUTH``."""
    ids = np.arange(len(comments.item))
    return pa.table({"comment_id": ids, "kind": comments.kind, "quality": comments.quality})
