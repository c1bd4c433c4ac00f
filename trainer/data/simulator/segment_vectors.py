"""Vectors of the segments of a world, as a multimodal model would give them, and the truth behind them.

A vector is a sum of four parts::

    topic(category, topic)  +  style(author)  +  drift(author, time)  +  noise

The drift is a stationary autoregressive process with one value at the start of each day, and is linear in between. The
noise of each segment is independent. All parts have the same spectrum: the variance of direction j is proportional to
1 / j^2, because the vectors of real models lie near few directions, too. Without that, thousands of codes would follow
the noise only.

The style of an author says nothing about who likes the author, unless the option ``taste`` lets a share of its variance
follow the traits that draw and hold viewers. Real content does so to an extent that nobody knows, so the default is 0.

Given author, time and topic, the topic of the next segment is therefore all that a predictor can still find out from
the past. That makes the best possible accuracy computable; see ``segment_truth``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trainer.data.format.content_vectors import SEGMENT_VECTORS, Origin, VectorPart, write_parts
from trainer.data.format.segments import segments_hash
from trainer.data.simulator.config import DAY_MS, START_MS
from trainer.data.simulator.content import PHASES
from trainer.data.simulator.population import CATEGORIES, TOPICS, Authors
from trainer.data.simulator.segment_truth import next_topics
from trainer.data.simulator.world import SimulatedWorld
from trainer.data.writing.builder import DatasetBuilder

DIM = 128
DEFAULT_NOISE = 0.8
"""Length of the noise. At this value, "the code of the last segment" and "the most frequent code of the author" predict
the next segment's code about equally well, at 2,000 codes (docs/data.md)."""

MOST_NOISE = 1_000.0
"""Upper limit of the noise. The vectors are stored as float16, whose largest number is 65,504."""

TOPIC, CATEGORY, STYLE, DRIFT = 1.0, 1.0, 1.0, 1.0
"""Lengths of the parts."""
DAY_TO_DAY = 0.9
"""Correlation of an author's drift at one day's start with that of the next."""

SPECTRUM = (np.arange(1, DIM + 1) ** -1.0).astype(np.float32)
SPECTRUM /= np.sqrt((SPECTRUM.astype(np.float64) ** 2).sum())

FIRST_DAY = -1
"""Day of the first value of the drift. Rooms of the day before the log may still be open when it starts."""

SEGMENTS_AT_ONCE = 1 << 16


class SegmentVectorGenerator:
    """Generator of the vectors of a world's segments.

    Args:
        world: the world.
        noise: length of the noise, 0 or more.
        taste: share of the variance of the styles that follows the latent vector, quality, bait and warmth of the
            authors, from 0 to 1.
    """

    def __init__(self, world: SimulatedWorld, noise: float, taste: float = 0.0) -> None:
        self._config, self._items = world.config, world.items
        self.noise = np.float32(noise) * SPECTRUM
        rng = world.config.generator("segment vectors")
        category, topic = _draw(rng, len(CATEGORIES)), _draw(rng, len(TOPICS))
        self.topics = np.zeros((len(TOPICS), DIM), np.float32)
        """``[topics, DIM]``, with the part of the category; a topic belongs to one category only."""
        for code, phases in enumerate(PHASES):
            for name, *_ in phases:
                self.topics[TOPICS.index(name)] = CATEGORY * category[code] + TOPIC * topic[TOPICS.index(name)]
        self._style = STYLE * _draw(rng, world.config.authors)
        if taste:
            visible = _follow(world.config.generator("segment taste"), author_traits(world.authors))
            self._style = np.float32(1 - taste) ** 0.5 * self._style + np.float32(taste) ** 0.5 * STYLE * visible

    def days(self) -> range:
        """Days at whose starts the drift has a value."""
        # a room that opens on the last day ends on the next one, and its drift is between that day's start and the next
        return range(FIRST_DAY, self._config.days + 2)

    def authors(self) -> Iterator[np.ndarray]:
        """Yield style plus drift of all authors at the start of each of ``days()``, ``[authors, DIM] float32``."""
        drift = np.zeros_like(self._style)
        for day in self.days():
            fresh = _draw(self._config.generator("segment drift", day - FIRST_DAY), len(drift))
            drift = fresh if day == FIRST_DAY else DAY_TO_DAY * drift + np.sqrt(1 - DAY_TO_DAY**2, dtype="f4") * fresh
            yield self._style + np.float32(DRIFT) * drift

    def parts(self) -> Iterator[VectorPart]:
        """Yield row numbers in ``segments.parquet`` and vectors ``[rows, DIM] float32``, in order."""
        rng = self._config.generator("segment noise")
        nodes, upcoming = dict[int, np.ndarray](), zip(self.days(), self.authors(), strict=True)
        for first in range(0, len(self._items.topic), SEGMENTS_AT_ONCE):
            rows = np.arange(first, min(first + SEGMENTS_AT_ONCE, len(self._items.topic)))
            times = self._items.segment_times(int(rows[0]), int(rows[-1]) + 1)
            day, share = day_and_share(times["start_ms"])
            # rooms are in order of start, so no later segment is before the start of this part's first room
            room_day = int(day_and_share(self._items.start_ms[times["item_id"][:1]])[0][0])
            nodes = {at: values for at, values in nodes.items() if at >= room_day}
            while day.max() + 1 not in nodes:
                at, values = next(upcoming)
                if at >= room_day:
                    nodes[at] = values
            vectors = self.noise * rng.standard_normal((len(rows), DIM), np.float32)
            vectors += self.topics[self._items.topic[rows]]
            author = self._items.author[times["item_id"]]
            for at in np.unique(day):
                here = np.flatnonzero(day == at)
                vectors[here] += between(nodes[at][author[here]], nodes[at + 1][author[here]], share[here])
            yield rows, vectors

    def write(self, builder: DatasetBuilder) -> None:
        """Write the vectors as ``embeddings/segments``, and their truth."""
        count = len(self._items.topic)
        origin = Origin(pooling="segment vectors of the simulated world")
        folder = builder.folder(SEGMENT_VECTORS)
        times = self._items.segment_times(0, count)
        author = self._items.author[times["item_id"]]
        segments = segments_hash(np.arange(count), times["item_id"], author, times["start_ms"], times["known_ms"])
        no_texts = np.zeros(count, np.uint64)
        write_parts(folder, np.arange(count), no_texts, self.parts(), DIM, origin=origin, segments=segments)
        for table in self._parameter_tables():
            builder.text_truth("segment_vectors", table)
        for first in range(0, count, SEGMENTS_AT_ONCE):
            builder.text_truth("segments", next_topics(self._items, first, min(first + SEGMENTS_AT_ONCE, count)))

    def _parameter_tables(self) -> Iterator[pa.Table]:
        """Yield the parameters of the vectors, as ``text_schema.SEGMENT_VECTOR_TRUTH``."""
        topics = np.unique(self._items.topic)
        yield _parameters("noise", np.zeros(1, np.int64), 0, self.noise[None])
        yield _parameters("topic", topics, 0, self.topics[topics])
        live = np.unique(self._items.author[self._items.videos :])
        for day, values in zip(self.days(), self.authors(), strict=True):
            yield _parameters("author", live, START_MS + day * DAY_MS, values[live])


def author_traits(authors: Authors) -> np.ndarray:
    """Return the traits of authors that decide who likes them, standardised, ``[authors, traits] float32``."""
    traits = np.column_stack([authors.vector, authors.quality, authors.bait, authors.warmth])
    return (traits - traits.mean(axis=0)) / np.maximum(traits.std(axis=0), 1e-6)


def day_and_share(time_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the day of each time, ``int64`` from ``START_MS`` on, and the part of it that has passed, ``float32``."""
    day = (time_ms - START_MS) // DAY_MS
    return day, ((time_ms - START_MS - day * DAY_MS) / DAY_MS).astype(np.float32)


def between(before: np.ndarray, after: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the vectors at ``share [n]`` of the way from ``before`` to ``after``, ``[n, DIM]`` each."""
    return before + share[:, None] * (after - before)


def _draw(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw vectors with the spectrum; their mean squared length is 1; ``[n, DIM] float32``."""
    return SPECTRUM * rng.standard_normal((n, DIM), np.float32)


def _follow(rng: np.random.Generator, traits: np.ndarray) -> np.ndarray:
    """Return random linear images of traits ``[n, k]``, with the spectrum; their mean squared length is 1."""
    images = traits @ rng.standard_normal((traits.shape[1], DIM), np.float32)
    return SPECTRUM * (images / np.maximum(images.std(axis=0), 1e-6))


def _parameters(part: str, ids: np.ndarray, time_ms: int, vectors: np.ndarray) -> pa.Table:
    """Return lines of ``text_schema.SEGMENT_VECTOR_TRUTH``."""
    return pa.table(
        {
            "part": [part] * len(ids),
            "id": ids.astype(np.int64),
            "time_ms": np.full(len(ids), time_ms),
            "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), DIM).cast(pa.list_(pa.float32())),
        }
    )
