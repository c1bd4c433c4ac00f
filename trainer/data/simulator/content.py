"""Content of a simulated world: short videos, and live rooms that consist of 30 s segments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.format.schema import DOMAINS
from trainer.data.format.text_schema import SEGMENT_MS
from trainer.data.simulator.config import DAY_MS, HOUR_MS, MINUTE_MS, START_MS, WorldConfig
from trainer.data.simulator.population import GENRES, GENRES_PER_CATEGORY, TOPICS, Authors

VIDEO, LIVE = DOMAINS.index("video"), DOMAINS.index("live")
SHELF_DAYS = 7
"""Days after its publication in which a video is recommended."""
VIDEOS_PER_AUTHOR_DAY = 1.0
MEAN_VIDEO_MS, MEAN_ROOM_MS = 55_000, HOUR_MS
DURATION_BANDS = 8

Phase = tuple[str, int, int, float, float]
PHASES: tuple[tuple[Phase, ...], ...] = (
    (("chat", 6, 20, 0.05, 0.25), ("dance", 4, 10, 0.7, 1.0)),
    (("lobby", 3, 8, 0.0, 0.15), ("match", 10, 24, 0.2, 0.5), ("climax", 2, 6, 0.8, 1.0)),
    (("pitch", 3, 8, 0.05, 0.2), ("demonstration", 4, 10, 0.25, 0.5), ("link", 1, 3, 0.75, 1.0)),
)
"""Phases of a room by category, repeated in a cycle.

A phase is its topic, the fewest and most segments it lasts, and its lowest and highest intensity.
"""

INTENSITY_WOBBLE = 0.04
"""Standard deviation of the intensity of a segment around the level of its phase."""
VECTOR_SPREAD, TRAIT_SPREAD = 0.35, 0.4
"""Standard deviations of an item's vector and of its traits around those of its author."""

ROOMS_AT_A_TIME = 8_192

LEAST_PROCESSING_MS, MEDIAN_PROCESSING_MS, PROCESSING_SPREAD = 1_000, 3_500, 0.7
"""Time from the end of a segment until its content is known: the least, the median, and the standard deviation of the
logarithm of what exceeds the least. One segment in 100 takes more than 13 seconds, and about 20 in 100,000 take more
than 30; some of these become known after the segment that follows them."""


@dataclass(frozen=True)
class Items:
    """All videos, then all rooms, each group in order of start. An item's id is its position.

    Attributes:
        videos: number of videos; ids from this number on are rooms.
        author: ``[n] int64``.
        start_ms: ``[n] int64``, publication of a video, opening of a room.
        end_ms: ``[n] int64``, start plus length.
        vector: ``[n, DIM] float32``.
        popularity, quality, bait: ``[n] float32``, the author's trait plus a deviation of the item.
        genre: ``[n] int64``.
        first_segment: ``[n + 1] int64``, offsets into the segment columns; videos have none.
        topic: ``[segments] int8``, positions in ``TOPICS``.
        intensity: ``[segments] float32`` in [0, 1], the true highlight curve.
        processing_ms: ``[segments] int32``, time from the end of a segment until its content is known.
    """

    videos: int
    author: np.ndarray
    start_ms: np.ndarray
    end_ms: np.ndarray
    vector: np.ndarray
    popularity: np.ndarray
    quality: np.ndarray
    bait: np.ndarray
    genre: np.ndarray
    first_segment: np.ndarray
    topic: np.ndarray
    intensity: np.ndarray
    processing_ms: np.ndarray

    def segment_times(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Return keys and times of the segments at positions ``first`` to ``last`` (excluded) of the segment columns.

        Returns:
            ``item_id`` (int64), ``segment`` (int32, from 0 in each room), ``start_ms`` and ``known_ms`` (int64). A
            segment is known after its end and the time of its processing.
        """
        position = np.arange(first, last)
        item = np.searchsorted(self.first_segment, position, side="right") - 1
        segment = position - self.first_segment[item]
        start_ms = self.start_ms[item] + segment * SEGMENT_MS
        known_ms = start_ms + SEGMENT_MS + self.processing_ms[first:last]
        return {"item_id": item, "segment": segment.astype(np.int32), "start_ms": start_ms, "known_ms": known_ms}

    def segment(self, item: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
        """Return the positions in the segment columns of what the rooms show at the given times, ``[n] int64``.

        Each time must lie between the start and the end of its room.
        """
        return self.first_segment[item] + (time_ms - self.start_ms[item]) // SEGMENT_MS


def make_items(config: WorldConfig, authors: Authors) -> Items:
    """Draw every video and every room, with the segments of the rooms."""
    video_author, video_start, video_end = _videos(config)
    room_author, room_start, room_end = _rooms(config, authors)
    author = np.concatenate([video_author, room_author])
    n, videos = len(author), len(video_author)
    rng = config.generator("items")
    genre = authors.genre[author]
    # some videos leave the author's genre; a room never does
    stray = np.flatnonzero(rng.random(videos) < 0.12)
    genre[stray] = rng.integers(0, GENRES, len(stray))
    counts = np.concatenate([np.zeros(videos, np.int64), (room_end - room_start) // SEGMENT_MS])
    topic, intensity = _segments(config, authors.genre[room_author] // GENRES_PER_CATEGORY, counts[videos:])

    def vary_by_item(trait: np.ndarray, deviation: float) -> np.ndarray:
        return trait[author] + deviation * rng.standard_normal((n, *trait.shape[1:]), np.float32)

    return Items(
        videos=videos,
        author=author,
        start_ms=np.concatenate([video_start, room_start]),
        end_ms=np.concatenate([video_end, room_end]),
        vector=vary_by_item(authors.vector, VECTOR_SPREAD),
        popularity=vary_by_item(authors.popularity, TRAIT_SPREAD),
        quality=vary_by_item(authors.quality, TRAIT_SPREAD),
        bait=vary_by_item(authors.bait, TRAIT_SPREAD),
        genre=genre,
        first_segment=np.concatenate([[0], np.cumsum(counts)]),
        topic=topic,
        intensity=intensity,
        processing_ms=_processing_ms(config, len(topic)),
    )


def _videos(config: WorldConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw author, publication time and end of each video, in order of publication.

    Videos of the ``SHELF_DAYS`` before the log are included, so that users have a full choice from the first day.
    """
    rng = config.generator("videos")
    days = SHELF_DAYS + config.days
    n = int(config.authors * days * VIDEOS_PER_AUTHOR_DAY)
    start = START_MS - SHELF_DAYS * DAY_MS + np.sort(rng.integers(0, days * DAY_MS, n))
    length = rng.lognormal(np.log(MEAN_VIDEO_MS) - 0.32, 0.8, n).clip(5_000, 600_000).astype(np.int64)
    return rng.integers(0, config.authors, n), start, start + length


def _rooms(config: WorldConfig, authors: Authors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw author, start and end of each room, in order of start.

    An author opens at most one room a day, around the author's usual hour. A newcomer opens none before a random day.
    """
    rng = config.generator("rooms")
    live = np.flatnonzero(authors.goes_live)
    habit = rng.uniform(0.5, 1.0, len(live))
    # the first live author goes live every day, so that every day has a room
    habit[0] = 1.0
    # rooms of the day before the log may still be open when it starts
    days = np.arange(-1, config.days)
    shape = (len(days), len(live))
    hour = authors.live_hour[live] + 0.7 * rng.standard_normal(shape)
    start = START_MS + ((days[:, None] + hour / 24) * DAY_MS).astype(np.int64)
    length = rng.lognormal(np.log(MEAN_ROOM_MS) - 0.125, 0.5, shape).clip(15 * MINUTE_MS, 4 * HOUR_MS)
    end = start + length.astype(np.int64) // SEGMENT_MS * SEGMENT_MS
    held = (rng.random(shape) < habit) & (end > START_MS) & (start < config.end_ms)
    held &= days[:, None] >= _first_days(config, len(live))
    author, start, end = np.broadcast_to(live, shape)[held], start[held], end[held]
    order = np.argsort(start, kind="stable")
    return author[order], start[order], end[order]


def _first_days(config: WorldConfig, live: int) -> np.ndarray:
    """Draw the day of the first room of each live author, ``[live] int64``; -1 for all but newcomers.

    The first live author is no newcomer, so that every day has a room.
    """
    first = np.full(live, -1)
    if config.newcomers:
        rng = config.generator("newcomers")
        new = rng.random(live) < config.newcomers
        new[0] = False
        first[new] = rng.integers(0, config.days, live)[new]
    return first


def _segments(config: WorldConfig, category: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw topic ``int8`` and intensity ``float32`` of every segment, room after room.

    ``category [rooms]`` is a position in ``CATEGORIES``, ``count [rooms]`` the number of segments of each room.
    """
    topic = np.empty(int(count.sum()), np.int8)
    intensity = np.empty(len(topic), np.float32)
    first = np.concatenate([[0], np.cumsum(count)])
    for chunk in range(0, len(count), ROOMS_AT_A_TIME):
        rng = config.generator("segments", chunk)
        for code, phases in enumerate(PHASES):
            rooms = chunk + np.flatnonzero(category[chunk : chunk + ROOMS_AT_A_TIME] == code)
            if len(rooms) == 0:
                continue
            values, levels = _phase_runs(rng, phases, count[rooms])
            # from positions among the drawn segments to positions in the columns of all rooms
            starts = np.repeat(first[rooms] - np.concatenate([[0], np.cumsum(count[rooms])[:-1]]), count[rooms])
            positions = starts + np.arange(len(values))
            topic[positions], intensity[positions] = values, levels
    return topic, intensity


def _processing_ms(config: WorldConfig, segments: int) -> np.ndarray:
    """Draw the time that the processing of each segment takes, ``[segments] int32``; log-normal beyond the least."""
    normal = config.generator("segment processing").standard_normal(segments, np.float32)
    beyond = (MEDIAN_PROCESSING_MS - LEAST_PROCESSING_MS) * np.exp(PROCESSING_SPREAD * normal)
    # an hour is more than any delay of a service that works
    return LEAST_PROCESSING_MS + np.minimum(beyond, HOUR_MS).astype(np.int32)


def _phase_runs(
    rng: np.random.Generator, phases: tuple[Phase, ...], count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the phases of rooms of one category.

    Each room starts in a random phase of the cycle and is cut at its number of segments ``count [rooms]``.

    Returns:
        Topic codes ``int8`` and intensities ``float32`` of all segments, room after room.
    """
    names, shortest, longest, low, high = (np.array(column) for column in zip(*phases, strict=True))
    # enough cycles of the shortest phases to fill the longest room
    turns = len(phases) * (int(count.max()) // int(shortest.sum()) + 2)
    phase = (rng.integers(0, len(phases), (len(count), 1)) + np.arange(turns)) % len(phases)
    ends = np.minimum(np.cumsum(rng.integers(shortest[phase], longest[phase] + 1), axis=1), count[:, None])
    run = np.diff(ends, axis=1, prepend=0).ravel()
    level = np.repeat(rng.uniform(low[phase], high[phase]).ravel(), run)
    codes = np.array([TOPICS.index(name) for name in names], np.int8)
    wobble = INTENSITY_WOBBLE * rng.standard_normal(len(level))
    return np.repeat(codes[phase].ravel(), run), np.clip(level + wobble, 0, 1).astype(np.float32)
