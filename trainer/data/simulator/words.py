"""Vocabulary of a simulated world: a few hundred words, and functions that combine them into texts.

Topic words are made up from syllables, ten per genre. They are the same in every world, so a tokenizer or a model that
was trained on one world can read another. Fixed word lists express the quality and the kind of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.simulator.population import GENRES, TOPICS

WORDS_PER_GENRE = 10
BANDS = 5
"""Number of quality levels that have words of their own; 0 is the lowest."""

KINDS: tuple[str, ...] = ("joke", "fact", "story", "question", "praise", "complaint")
"""Kinds of comments; a code is a position in this tuple."""

FRAMES: dict[str, tuple[str, ...]] = {
    "joke": ("haha imagine", "plot twist with", "nobody expects"),
    "fact": ("in fact this is", "few people know that", "the numbers say"),
    "story": ("my neighbour once had", "last winter we met", "back home there was"),
    "question": ("does anyone understand", "where can I find", "why is there no"),
    "praise": ("so much love for", "bravo for", "I never get enough of"),
    "complaint": ("I am tired of", "please stop with", "it was better without"),
}
COMMENT_MARKS: tuple[tuple[str, ...], ...] = (
    ("spam", "first", "copy"),
    ("hm", "okay", "whatever"),
    ("well", "right", "sure"),
    ("nice", "clever", "good point"),
    ("brilliant", "priceless", "the best comment"),
)
VIDEO_MARKS: tuple[tuple[str, ...], ...] = (
    ("shaky", "careless", "leftover"),
    ("plain", "quick", "simple"),
    ("usual", "daily", "steady"),
    ("careful", "polished", "bright"),
    ("masterly", "stunning", "award winning"),
)
AUTHOR_MARKS: tuple[tuple[str, ...], ...] = (
    ("distant", "silent"),
    ("quiet", "reserved"),
    ("relaxed", "easy going"),
    ("friendly", "cheerful"),
    ("warm hearted", "generous"),
)
"""Words by band: of quality for comments and videos (the two tables above), of warmth for authors."""
SPEECH: dict[str, tuple[str, ...]] = {
    "chat": ("how was your day", "let me read your messages", "we talk about"),
    "dance": ("music please", "watch this move", "one more dance with"),
    "lobby": ("waiting for players", "choosing a team", "warming up with"),
    "match": ("they attack", "hold the line", "now we push"),
    "climax": ("last round", "unbelievable", "this decides it"),
    "pitch": ("today on the table", "new in the shop", "look at the price of"),
    "demonstration": ("let me show you", "see how it works", "I try it on"),
    "link": ("the link is open", "only a few left", "buy now"),
}
"""Phrases spoken in a segment, by its topic."""
VOLUME = ("calmly", "evenly", "loudly", "shouting", "screaming")
"""Adverbs of a segment's speech, by intensity."""

_SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]


def _topic_words() -> np.ndarray:
    """Return the made-up topic words, ``[GENRES, WORDS_PER_GENRE]`` strings."""
    # a fixed seed, so that all worlds share one vocabulary
    rng = np.random.default_rng(0)
    words: list[str] = []
    while len(words) < GENRES * WORDS_PER_GENRE:
        word = "".join(rng.choice(_SYLLABLES, rng.integers(2, 4)).tolist())
        if word not in words:
            words.append(word)
    return np.array(words, object).reshape(GENRES, WORDS_PER_GENRE)


TOPIC_WORDS = _topic_words()
"""``[GENRES, WORDS_PER_GENRE]`` words; the first is the genre's name."""

SEGMENT_SPEECH: tuple[tuple[str, ...], ...] = tuple(SPEECH.get(topic, ("",)) for topic in TOPICS)


def pick_words(words: Sequence[Sequence[str]] | np.ndarray, row: np.ndarray, uniform: np.ndarray) -> pa.Array:
    """Pick a word ``words[row][draw]`` for each row. ``row [n]``, ``uniform [n]`` in [0, 1) -> ``[n]`` strings."""
    sizes = np.array([len(choices) for choices in words])
    first = np.cumsum(sizes) - sizes
    flat = pa.array([word for choices in words for word in choices], pa.string())
    return flat.take(pa.array(first[row] + (uniform * sizes[row]).astype(np.int64)))


def topic_words(genre: np.ndarray, uniform: np.ndarray) -> pa.Array:
    """Pick two different words of each genre. ``genre [n]``, ``uniform [2, n]`` in [0, 1) -> ``[n]`` strings."""
    first = (uniform[0] * WORDS_PER_GENRE).astype(np.int64)
    second = (first + 1 + (uniform[1] * (WORDS_PER_GENRE - 1)).astype(np.int64)) % WORDS_PER_GENRE
    return join_words(*(pa.array(TOPIC_WORDS[genre, word], pa.string()) for word in (first, second)))


def join_words(*parts: pa.Array | str) -> pa.Array:
    """Join the parts row by row with spaces, ``[n]`` strings."""
    return pc.binary_join_element_wise(*parts, " ")


def quality_band(score: np.ndarray) -> np.ndarray:
    """Return the band 0 to ``BANDS - 1`` of a score of mean 0 and variance 1, ``[n] int64``.

    The bands are equally frequent.
    """
    # the quintiles of a standard normal distribution
    return np.searchsorted(np.array([-0.842, -0.253, 0.253, 0.842]), score)
