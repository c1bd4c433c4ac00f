"""Population of the cross world: authors with their videos and rooms, and users with their interests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import BEHAVIOURS, START_MS
from trainer.data.simulator.cross.config import (
    ACTIVITY_SPREAD,
    AUTHORS,
    GENRES,
    LATEST_VIDEOS,
    MOST_PER_DAY,
    NICHES,
    ROOM_EVERY_MS,
    STYLES,
    VECTOR_DIM,
    VECTOR_NOISE,
    VIDEO_EVERY_MS,
    CrossConfig,
)

TRAIT_SCALE = 0.5
VIDEO_MS = (4_000, 55_000, 600_000)
"""Lengths of the shortest, the median and the longest video."""


@dataclass(frozen=True)
class CrossCatalogue:
    """Authors and items of a cross world; the ids of authors and items are positions.

    Attributes:
        quality: ``[AUTHORS] float32``, standardised; affects all users alike.
        video_phase: ``[AUTHORS]`` in [0, 1), time of publication as a fraction of ``VIDEO_EVERY_MS``.
        room_phase: ``[AUTHORS]`` in [0, 1), time of opening as a fraction of ``ROOM_EVERY_MS``.
        author: ``[items] int64``.
        start_ms: ``[items] int64``, publication of a video, opening of a room.
        length_ms: ``[videos] int64``.
        niche: ``[items] int64``.
        vector: ``[items, VECTOR_DIM] float32``, content vectors of length 1.
    """

    quality: np.ndarray
    video_phase: np.ndarray
    room_phase: np.ndarray
    author: np.ndarray
    start_ms: np.ndarray
    length_ms: np.ndarray
    niche: np.ndarray
    vector: np.ndarray


@dataclass(frozen=True)
class CrossUsers:
    """Activity and interests of ``n`` users; the interests are standard normal.

    Attributes:
        daily: ``[n] float64``, mean exposures a day.
        slow: ``[n, NICHES] float32``, lasting interest in niches, in both domains.
        live_slow: ``[n, NICHES] float32``, lasting interest in niches, in live rooms only.
        bond: ``[n, AUTHORS] float32``, lasting interest in authors.
        trait: ``[n, behaviours] float32``, inclination to each behaviour in log-odds.
    """

    daily: np.ndarray
    slow: np.ndarray
    live_slow: np.ndarray
    bond: np.ndarray
    trait: np.ndarray


def genre_of(author: np.ndarray) -> np.ndarray:
    """Return the genre of each author, ``[n] int64``."""
    return author % GENRES


def style_of(author: np.ndarray) -> np.ndarray:
    """Return the style of each author, ``[n] int64``."""
    return author // GENRES % STYLES


def make_catalogue(config: CrossConfig) -> CrossCatalogue:
    """Draw the authors, their videos and their rooms."""
    rng = config.generator("catalogue")
    video_phase, room_phase = rng.random((2, AUTHORS))
    # publications are periodic, so the latest video and the open room follow from the time without a search
    videos = np.arange(config.videos_per_author) - LATEST_VIDEOS + video_phase[:, None]
    rooms = np.arange(config.rooms_per_author) - 1 + room_phase[:, None]
    start = [VIDEO_EVERY_MS * videos, ROOM_EVERY_MS * rooms]
    author = [np.repeat(np.arange(AUTHORS), times.shape[1]) for times in start]
    shortest, median, longest = VIDEO_MS
    length = rng.lognormal(np.log(median), 0.8, config.videos).clip(shortest, longest)
    niche = rng.integers(0, NICHES, config.items)
    direction = _unit(rng.standard_normal((NICHES, VECTOR_DIM), np.float32))
    noise = _unit(rng.standard_normal((config.items, VECTOR_DIM), np.float32))
    return CrossCatalogue(
        quality=rng.standard_normal(AUTHORS, np.float32),
        video_phase=video_phase,
        room_phase=room_phase,
        author=np.concatenate(author),
        start_ms=START_MS + np.concatenate([times.ravel() for times in start]).astype(np.int64),
        length_ms=length.astype(np.int64),
        niche=niche,
        vector=_unit(direction[niche] + np.float32(VECTOR_NOISE) * noise),
    )


def make_users(config: CrossConfig) -> CrossUsers:
    """Draw the users of a world."""
    rng, n = config.generator("users"), config.users
    activity = np.exp(ACTIVITY_SPREAD * rng.standard_normal(n) - ACTIVITY_SPREAD**2 / 2)
    return CrossUsers(
        daily=np.minimum(config.exposures_per_day * activity, MOST_PER_DAY),
        slow=rng.standard_normal((n, NICHES), np.float32),
        live_slow=rng.standard_normal((n, NICHES), np.float32),
        bond=rng.standard_normal((n, AUTHORS), np.float32),
        trait=TRAIT_SCALE * rng.standard_normal((n, len(BEHAVIOURS)), np.float32),
    )


def latest_video(config: CrossConfig, catalogue: CrossCatalogue, author: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Return the last video that each author published by a time, ``[n] int64``.

    The author's earlier videos have the ids just below it.
    """
    days = (time_ms - START_MS) / VIDEO_EVERY_MS - catalogue.video_phase[author]
    return author * config.videos_per_author + LATEST_VIDEOS + np.floor(days).astype(np.int64)


def open_room(config: CrossConfig, catalogue: CrossCatalogue, author: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Return the room that each author opened last by a time, ``[n] int64``."""
    rooms = (time_ms - START_MS) / ROOM_EVERY_MS - catalogue.room_phase[author]
    return config.videos + author * config.rooms_per_author + 1 + np.floor(rooms).astype(np.int64)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
