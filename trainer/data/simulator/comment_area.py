"""The comment area: what it shows, whether it is opened, for how long, and which comments are liked or answered.

A comment appeals to a user by its quality, by the user's taste for its kind and by whether it is about one of the
user's favourite genres. A visit's comment area is opened with a probability, and then stayed in for a log-normal time
plus a few seconds for each comment that is touched; all of it is a function of the world at the time of the request,
so the expected staytime is known exactly. The area lies over the video: neither the visit's end nor the user's day
depends on it, and the rest of the log is the same with and without it.
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
from trainer.data.simulator.user_days import Visits
from trainer.data.simulator.words import KINDS
from trainer.data.simulator.world import World

SHOWN = 10
"""Most comments at the top of the area."""
READ = 6
"""Comments whose mean appeal moves opening and staying."""
DISPLAY_NOISE = 0.5
"""Scale of the noise in the order of display, beside the logarithm of the likes."""

APPEAL_QUALITY, APPEAL_TASTE, APPEAL_TOPIC = 0.7, 1.3, 0.8
OPEN_CONSTANT = -3.05
SECONDS_MEDIAN, SECONDS_SPREAD = 5.0, 0.7
SECONDS_PER_INTERACTION = 5.0
INTERACT_CONSTANT, INTERACT_APPEAL, INTERACT_PLACE = -5.2, 1.3, -0.1
NOTHING_TO_READ = -1.0
"""Mean appeal of an area without comments."""

VISITS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Readers:
    """What users are like in the comments.

    Attributes:
        taste: ``[users, kinds] float32``, for each kind of comment.
        chattiness: ``[users] float32``.
    """

    taste: np.ndarray
    chattiness: np.ndarray


@dataclass(frozen=True)
class Area:
    """The comment areas of ``n`` visits.

    Attributes:
        shown: ``[n, SHOWN] int64`` comments in the order of display; anything where ``there`` is not set.
        there: ``[n, SHOWN] bool``.
        likes: ``[n, SHOWN] int64``, of each at the time.
        open: ``[n] float64``, true probability that the area is opened.
        seconds: ``[n] float64``, true mean of the staytime without interactions if it is opened.
        interact: ``[n, SHOWN] float64``, true probabilities of an interaction if it is opened; 0 where not ``there``.
    """

    shown: np.ndarray
    there: np.ndarray
    likes: np.ndarray
    open: np.ndarray
    seconds: np.ndarray
    interact: np.ndarray


def make_readers(world: World) -> Readers:
    """Draw what the users of a world are like in the comments. Who comments much is chatty, more or less."""
    rng, users = world.config.generator("readers"), world.users
    n = world.config.users
    comments_much = users.inclination(np.full(n, VIDEO), np.arange(n))[:, BEHAVIOURS.index("comment")]
    comments_much = comments_much / TRAIT_SCALE[BEHAVIOURS.index("comment")]
    return Readers(
        taste=rng.standard_normal((n, len(KINDS)), np.float32),
        chattiness=0.6 * comments_much + 0.8 * rng.standard_normal(n, np.float32),
    )


def area(
    world: World,
    comments: Comments,
    readers: Readers,
    user: np.ndarray,
    item: np.ndarray,
    request_ms: np.ndarray,
    rng: np.random.Generator,
) -> Area:
    """The comment areas that ``n`` visits of users to videos meet; all arguments ``[n] int64``."""
    shown, there, likes = _display(comments, item, request_ms, rng)
    users, items = world.users, world.items
    favourites = users.favourites[user]
    topical = (comments.genre[shown][:, :, None] == favourites[:, None, :]).any(axis=2)
    appeal = (
        APPEAL_QUALITY * comments.quality[shown].astype(np.float64)
        + APPEAL_TASTE * readers.taste[user[:, None], comments.kind[shown]]
        + APPEAL_TOPIC * topical
    )
    read = there[:, :READ]
    some = read.any(axis=1)
    mean_appeal = np.where(
        some, (appeal[:, :READ] * read).sum(axis=1) / np.maximum(read.sum(axis=1), 1), NOTHING_TO_READ
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
        + 0.2 * np.log1p(there.sum(axis=1))
    )
    log_median = (
        np.log(SECONDS_MEDIAN)
        + 0.45 * mean_appeal
        + 0.35 * chattiness
        + 0.25 * liked_genre
        + 0.2 * quality
        + 0.1 * length
    )
    touch_odds = INTERACT_CONSTANT + INTERACT_APPEAL * appeal + INTERACT_PLACE * np.arange(SHOWN)
    return Area(
        shown=shown,
        there=there,
        likes=likes,
        open=_logistic(open_odds),
        seconds=np.exp(log_median + SECONDS_SPREAD**2 / 2),
        interact=np.where(there, _logistic(touch_odds), 0.0),
    )


def comment_visits(
    world: World, comments: Comments, readers: Readers, visits: Visits, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    """What came of the comment areas of some visits.

    Returns:
        The visits to videos as ``text_schema.VISITS``, and what they were drawn from as ``STAYTIME_TRUTH``.
    """
    of_video = np.flatnonzero(visits["domain"] == VIDEO)
    parts = [
        _visit_part(world, comments, readers, {name: visits[name][at] for name in _KEYS}, rng)
        for at in np.array_split(of_video, max(1, -(-len(of_video) // VISITS_AT_ONCE)))
    ]
    tables, truths = zip(*parts, strict=True)
    return pa.concat_tables(tables), pa.concat_tables(truths)


_KEYS = ("visit_id", "user_id", "item_id", "request_ms")


def _visit_part(
    world: World, comments: Comments, readers: Readers, visits: Visits, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    met = area(world, comments, readers, visits["user_id"], visits["item_id"], visits["request_ms"], rng)
    n = len(met.open)
    opened = rng.random(n) < met.open
    touched = (rng.random(met.shown.shape) < met.interact) & opened[:, None]
    noise = np.exp(SECONDS_SPREAD * rng.standard_normal(n) - SECONDS_SPREAD**2 / 2)
    seconds = met.seconds * noise + SECONDS_PER_INTERACTION * touched.sum(axis=1)
    keys = {name: visits[name] for name in _KEYS}
    # an area that was opened has a staytime above 0
    staytime_ms = np.where(opened, np.maximum(1, np.rint(SECOND_MS * seconds)), 0).astype(np.int64)
    offsets = _offsets(met.there)
    table = pa.table(
        keys
        | {
            "staytime_ms": staytime_ms,
            "shown": list_column(met.shown[met.there], offsets),
            "shown_likes": list_column(met.likes[met.there], offsets),
            "interacted": list_column(met.shown[touched], _offsets(touched)),
        }
    )
    interact = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), met.interact[met.there].astype(np.float32))
    mean = met.seconds + SECONDS_PER_INTERACTION * met.interact.sum(axis=1)
    truth = pa.table(
        {name: keys[name] for name in ("visit_id", "user_id", "request_ms")}
        | {"p_open": met.open.astype(np.float32), "seconds_if_open": mean.astype(np.float32), "p_interact": interact}
    )
    return table, truth


def _display(
    comments: Comments, item: np.ndarray, request_ms: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Comments at the top of the area, which of the places are taken, and the likes; all ``[n, SHOWN]``."""
    place = comments.first[item][:, None] + np.arange(MOST_COMMENTS)
    written = place < comments.first[item + 1][:, None]
    place = np.minimum(place, max(len(comments.item) - 1, 0))
    written &= comments.time_ms[place] <= request_ms[:, None]
    likes = comments.likes(place, request_ms[:, None])
    score = np.log1p(likes, dtype=np.float32) + DISPLAY_NOISE * rng.standard_normal(place.shape, np.float32)
    score[~written] = -np.inf
    order = np.argsort(-score, axis=1, kind="stable")[:, :SHOWN]
    return tuple(np.take_along_axis(values, order, axis=1) for values in (place, written, likes))  # type: ignore[return-value]


def _offsets(there: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(there.sum(axis=1))])


def _logistic(odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-odds))
