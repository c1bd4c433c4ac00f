"""Comments under the videos of a world: their traits, texts and likes over time.

The authors of comments are not simulated users. A comment has a kind, a genre and a quality, and its words express
them with some noise. Its likes grow with time towards a limit that depends on its quality and its video. Likes are the
count of the whole platform, of which the simulated users are a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import UNKNOWN_USER
from trainer.data.simulator.config import DAY_MS, WorldConfig
from trainer.data.simulator.population import GENRES
from trainer.data.simulator.words import COMMENT_MARKS, FRAMES, KINDS, join_words, pick_words, quality_band, topic_words
from trainer.data.simulator.world import SimulatedWorld

MEAN_COMMENTS, MOST_COMMENTS = 8.0, 32
"""Mean number of comments of a video of average popularity, and most comments of any video."""
DELAY_MS = DAY_MS // 2
"""Mean time from a video's publication to a comment."""
STRAY = 0.15
"""Probability that the genre of a comment is random instead of the video's."""
LIKES_QUALITY, LIKES_POPULARITY, LIKES_NOISE, LIKES_CONSTANT = 1.1, 0.5, 0.5, 2.0
"""Coefficients of the logarithm of a comment's final likes."""
LIKES_MS = DAY_MS
"""Age at which a comment has 63 % of its final likes."""
WORDING_NOISE = 0.25
"""Standard deviation of the noise between the quality of a comment and the quality that its words express."""


@dataclass(frozen=True)
class Comments:
    """All comments of a world, video after video and in order of time. A comment's id is its position.

    Attributes:
        first: ``[videos + 1] int64`` offsets of the videos in the columns.
        item: ``[n] int64``, video of the comment.
        time_ms: ``[n] int64``, time of writing.
        kind: ``[n] int8``, positions in ``words.KINDS``.
        genre: ``[n] int64``, genre that the comment is about.
        quality: ``[n] float32``, standard normal plus a part of the video's quality.
        final_likes: ``[n] float32``, limit of the likes.
    """

    first: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    kind: np.ndarray
    genre: np.ndarray
    quality: np.ndarray
    final_likes: np.ndarray

    def likes(self, comment: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
        """Return the likes of comments at a time, int64 of the broadcast shape; 0 before a comment is written."""
        age = np.maximum(time_ms - self.time_ms[comment], 0).astype(np.float32)
        return (self.final_likes[comment] * -np.expm1(age / np.float32(-LIKES_MS))).astype(np.int64)


def make_comments(world: SimulatedWorld) -> Comments:
    """Draw the comments that are written before the end of the world."""
    config, items = world.config, world.items
    rng = config.generator("comments")
    videos = np.arange(items.videos)
    lift = 0.5 * items.popularity[videos] + 0.3 * world.authors.warmth[items.author[videos]] - 0.2
    count = np.minimum(rng.poisson(MEAN_COMMENTS * np.exp(lift)), MOST_COMMENTS)
    item = np.repeat(videos, count)
    time_ms = items.start_ms[item] + rng.exponential(DELAY_MS, len(item)).astype(np.int64)
    item, time_ms = item[time_ms < config.end_ms], time_ms[time_ms < config.end_ms]
    # comments after the end of the world are dropped above, so positions (the ids) have no gaps
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
        final_likes=np.exp(log_likes).astype(np.float32),
    )


def comment_table(config: WorldConfig, comments: Comments) -> pa.Table:
    """Return the comments as ``text_schema.COMMENTS``."""
    rng = config.generator("comment texts")
    n = len(comments.item)
    uniform = rng.random((4, n))
    band = quality_band(comments.quality + WORDING_NOISE * rng.standard_normal(n))
    text = join_words(
        pick_words(COMMENT_MARKS, band, uniform[0]),
        pick_words([FRAMES[kind] for kind in KINDS], comments.kind, uniform[1]),
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
    """Return the true kind and quality of the comments, as ``text_schema.COMMENT_TRUTH``."""
    ids = np.arange(len(comments.item))
    return pa.table({"comment_id": ids, "kind": comments.kind, "quality": comments.quality})
