"""Comment area of a video: the comments shown, the staytime, and the comments that a user likes or answers.

The appeal of a comment to a user depends on its quality, on the user's taste for its kind and on whether its genre is
one of the user's favourites. A visit opens its comment area with some probability. The staytime is then a log-normal
time plus a few seconds for each comment that the user likes or answers. All of this is a function of the world at the
time of the request, so the expected staytime is known exactly. The area lies over the video: neither the end of the
visit nor the user's day depends on it, and the rest of the log is the same with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import list_column
from trainer.data.simulator.comments import MOST_COMMENTS, Comments
from trainer.data.simulator.config import BEHAVIOURS, SECOND_MS
from trainer.data.simulator.content import MEAN_VIDEO_MS, VIDEO
from trainer.data.simulator.population import TRAIT_SCALE
from trainer.data.simulator.user_days import VisitColumns
from trainer.data.simulator.words import KINDS
from trainer.data.simulator.world import SimulatedWorld

SHOWN = 10
"""Most comments shown at the top of the area."""
READ = 6
"""Number of top comments whose mean appeal affects the opening and the staytime."""
DISPLAY_NOISE = 0.5
"""Standard deviation of the noise that is added to the logarithm of the likes for the order of display."""

APPEAL_QUALITY, APPEAL_TASTE, APPEAL_TOPIC = 0.7, 1.3, 0.8
OPEN_CONSTANT = -3.05
SECONDS_MEDIAN, SECONDS_SPREAD = 5.0, 0.7
SECONDS_PER_INTERACTION = 5.0
INTERACT_CONSTANT, INTERACT_APPEAL, INTERACT_PLACE = -5.2, 1.3, -0.1
NOTHING_TO_READ = -1.0
"""Mean appeal of an area without comments."""

VISITS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class CommentReaders:
    """Traits of the users that matter in the comment area.

    Attributes:
        taste: ``[users, kinds] float32``, taste for each kind of comment.
        chattiness: ``[users] float32``, general interest in comments.
    """

    taste: np.ndarray
    chattiness: np.ndarray


@dataclass(frozen=True)
class CommentAreas:
    """Comment areas of ``n`` visits.

    Attributes:
        shown: ``[n, SHOWN] int64`` comments in the order of display; undefined where ``filled`` is False.
        filled: ``[n, SHOWN] bool``, True for a place that holds a comment.
        likes: ``[n, SHOWN] int64``, likes of each comment at the time of the request.
        open: ``[n] float64``, true probability that the area is opened.
        seconds: ``[n] float64``, true mean of the staytime without interactions, if the area is opened.
        interact: ``[n, SHOWN] float64``, true probability of an interaction with each comment, if the area is opened;
            0 where ``filled`` is False.
    """

    shown: np.ndarray
    filled: np.ndarray
    likes: np.ndarray
    open: np.ndarray
    seconds: np.ndarray
    interact: np.ndarray


def make_comment_readers(world: SimulatedWorld) -> CommentReaders:
    """Draw the readers' traits of all users. Chattiness is correlated with the inclination to comment."""
    rng, users = world.config.generator("readers"), world.users
    n = world.config.users
    comment_inclination = users.inclination(np.full(n, VIDEO), np.arange(n))[:, BEHAVIOURS.index("comment")]
    comment_inclination = comment_inclination / TRAIT_SCALE[BEHAVIOURS.index("comment")]
    return CommentReaders(
        taste=rng.standard_normal((n, len(KINDS)), np.float32),
        chattiness=0.6 * comment_inclination + 0.8 * rng.standard_normal(n, np.float32),
    )


def comment_areas(
    world: SimulatedWorld,
    comments: Comments,
    readers: CommentReaders,
    user: np.ndarray,
    item: np.ndarray,
    request_ms: np.ndarray,
    rng: np.random.Generator,
) -> CommentAreas:
    """Return the comment areas of ``n`` visits to videos; ``user``, ``item`` and ``request_ms`` are ``[n] int64``."""
    shown, filled, likes = _display(comments, item, request_ms, rng)
    users, items = world.users, world.items
    favourites = users.favourites[user]
    topical = (comments.genre[shown][:, :, None] == favourites[:, None, :]).any(axis=2)
    appeal = (
        APPEAL_QUALITY * comments.quality[shown].astype(np.float64)
        + APPEAL_TASTE * readers.taste[user[:, None], comments.kind[shown]]
        + APPEAL_TOPIC * topical
    )
    read = filled[:, :READ]
    any_comment = read.any(axis=1)
    mean_appeal = np.where(
        any_comment, (appeal[:, :READ] * read).sum(axis=1) / np.maximum(read.sum(axis=1), 1), NOTHING_TO_READ
    )
    liked_genre = (items.genre[item][:, None] == favourites).any(axis=1)
    quality, chattiness = items.quality[item].astype(np.float64), readers.chattiness[user].astype(np.float64)
    length = np.log((items.end_ms[item] - items.start_ms[item]) / MEAN_VIDEO_MS)
    open_odds = (
        OPEN_CONSTANT
        + 0.6 * mean_appeal
        + 0.6 * chattiness
        + 0.3 * liked_genre
        + 0.3 * quality
        + 0.2 * np.log1p(filled.sum(axis=1))
    )
    log_median = (
        np.log(SECONDS_MEDIAN)
        + 0.45 * mean_appeal
        + 0.35 * chattiness
        + 0.25 * liked_genre
        + 0.2 * quality
        + 0.1 * length
    )
    interact_odds = INTERACT_CONSTANT + INTERACT_APPEAL * appeal + INTERACT_PLACE * np.arange(SHOWN)
    return CommentAreas(
        shown=shown,
        filled=filled,
        likes=likes,
        open=_logistic(open_odds),
        seconds=np.exp(log_median + SECONDS_SPREAD**2 / 2),
        interact=np.where(filled, _logistic(interact_odds), 0.0),
    )


def comment_visits(
    world: SimulatedWorld, comments: Comments, readers: CommentReaders, visits: VisitColumns, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    """Draw the staytimes and interactions of visits in the comment areas.

    Returns:
        The visits to videos as ``text_schema.VISITS``, and their true probabilities and means as ``STAYTIME_TRUTH``.
    """
    video_rows = np.flatnonzero(visits["domain"] == VIDEO)
    parts = [
        _visit_part(world, comments, readers, {name: visits[name][rows] for name in _KEYS}, rng)
        for rows in np.array_split(video_rows, max(1, -(-len(video_rows) // VISITS_AT_ONCE)))
    ]
    tables, truths = zip(*parts, strict=True)
    return pa.concat_tables(tables), pa.concat_tables(truths)


_KEYS = ("visit_id", "user_id", "item_id", "request_ms")


def _visit_part(
    world: SimulatedWorld, comments: Comments, readers: CommentReaders, visits: VisitColumns, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    """Draw the staytimes and interactions of at most ``VISITS_AT_ONCE`` visits to videos, as ``comment_visits``."""
    areas = comment_areas(world, comments, readers, visits["user_id"], visits["item_id"], visits["request_ms"], rng)
    n = len(areas.open)
    opened = rng.random(n) < areas.open
    interacted = (rng.random(areas.shown.shape) < areas.interact) & opened[:, None]
    # log-normal noise of mean 1, so that the mean without interactions is exactly ``areas.seconds``
    noise = np.exp(SECONDS_SPREAD * rng.standard_normal(n) - SECONDS_SPREAD**2 / 2)
    seconds = areas.seconds * noise + SECONDS_PER_INTERACTION * interacted.sum(axis=1)
    keys = {name: visits[name] for name in _KEYS}
    # a staytime of 0 means that the area was not opened, so an opened one gets at least 1 ms
    staytime_ms = np.where(opened, np.maximum(1, np.rint(SECOND_MS * seconds)), 0).astype(np.int64)
    offsets = _offsets(areas.filled)
    table = pa.table(
        keys
        | {
            "staytime_ms": staytime_ms,
            "shown": list_column(areas.shown[areas.filled], offsets),
            "shown_likes": list_column(areas.likes[areas.filled], offsets),
            "interacted": list_column(areas.shown[interacted], _offsets(interacted)),
        }
    )
    interact = pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), areas.interact[areas.filled].astype(np.float32)
    )
    mean = areas.seconds + SECONDS_PER_INTERACTION * areas.interact.sum(axis=1)
    truth = pa.table(
        {name: keys[name] for name in ("visit_id", "user_id", "request_ms")}
        | {"p_open": areas.open.astype(np.float32), "seconds_if_open": mean.astype(np.float32), "p_interact": interact}
    )
    return table, truth


def _display(
    comments: Comments, item: np.ndarray, request_ms: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the comments at the top of the area, the mask of filled places, and the likes; all ``[n, SHOWN]``."""
    position = comments.first[item][:, None] + np.arange(MOST_COMMENTS)
    # a table of all comments of each video, padded to the longest list
    written = position < comments.first[item + 1][:, None]
    position = np.minimum(position, max(len(comments.item) - 1, 0))
    written &= comments.time_ms[position] <= request_ms[:, None]
    likes = comments.likes(position, request_ms[:, None])
    score = np.log1p(likes, dtype=np.float32) + DISPLAY_NOISE * rng.standard_normal(position.shape, np.float32)
    score[~written] = -np.inf
    order = np.argsort(-score, axis=1, kind="stable")[:, :SHOWN]
    return tuple(np.take_along_axis(values, order, axis=1) for values in (position, written, likes))  # type: ignore[return-value]


def _offsets(filled: np.ndarray) -> np.ndarray:
    """Return the list offsets of the True values in each row, ``[n + 1]``. ``filled [n, m] bool``."""
    return np.concatenate([[0], np.cumsum(filled.sum(axis=1))])


def _logistic(odds: np.ndarray) -> np.ndarray:
    """Return the logistic function of log-odds."""
    return 1 / (1 + np.exp(-odds))
