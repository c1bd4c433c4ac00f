"""Exposure policy: selects the item shown to a user by popularity, familiarity, preference and exploration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import DAY_MS, MINUTE_MS, START_MS, WorldConfig
from trainer.data.simulator.content import LIVE, SHELF_DAYS, VIDEO, Items
from trainer.data.simulator.population import TASTE, Users

POPULAR = (4, 9)
FAMILIAR = (1, 3)
"""Numbers of candidates drawn by popularity and from familiar authors, for a video and for a live exposure."""

POPULARITY_WEIGHT = (0.6, 0.8)
TASTE_WEIGHT, MOOD_WEIGHT, FAMILIAR_WEIGHT = 0.6, 0.4, 0.5
TASTE_SCALE = np.float32(TASTE_WEIGHT / np.sqrt(TASTE.stop - TASTE.start))
"""Weights of the policy's score. The policy draws a candidate from the softmax of the scores, so it also explores."""
FOLLOWING_TAB_WEIGHT = 4.0
"""Score added to items of familiar authors in the ``following`` scene."""

SCENES: tuple[str, ...] = ("unknown", "feed", "following", "nearby", "plaza")
"""Scenes of an exposure; a code is a position in this tuple. The plaza shows live rooms only."""
SCENE_SHARE = np.array([[0, 0.8, 0.08, 0.12, 0], [0, 0.55, 0.15, 0.1, 0.2]])
SCENE_EDGES = np.cumsum(SCENE_SHARE, axis=1)
FEED, FOLLOWING_TAB, PLAZA = (SCENES.index(name) for name in ("feed", "following", "plaza"))

SLOT_MS = 5 * MINUTE_MS
LAST_CALL_MS = 2 * MINUTE_MS
"""Time before its end from which a room is no longer recommended."""
DRAWS_PER_VIDEO = 8
"""Mean number of entries per video in ``CandidateIndex.video_draw``; with more entries popularity is more exact."""
LATEST_VIDEOS = 3
"""Number of latest videos of a familiar author from which a candidate is drawn; for live, it is the open room."""

_OLDEST_DAYS = SHELF_DAYS + 1
_BUCKET_MS = DAY_MS // 2


class BucketSearch:
    """Search of a sorted column that starts at a bucket of similar values.

    It is several times faster than bisection and gives the same result.

    Args:
        column: ``[n]`` sorted, no value below 0.
        step: width of a bucket of values; a search starts at the first entry of the value's bucket.
        end: upper limit of the values that are searched for.
    """

    def __init__(self, column: np.ndarray, step: float, end: float) -> None:
        self._per_step = 1 / step
        buckets = 2 + int(end * self._per_step)
        self._first = np.searchsorted(self._bucket(column), np.arange(buckets))
        self._column = np.append(column, np.inf if column.dtype.kind == "f" else np.iinfo(column.dtype).max)

    def search(self, value: np.ndarray) -> np.ndarray:
        """Return ``np.searchsorted(column, value, side="right")``."""
        position = self._first.take(self._bucket(value))
        while (before := self._column.take(position) <= value).any():
            position += before
        return position

    def _bucket(self, value: np.ndarray) -> np.ndarray:
        """Return the bucket of each value, int64."""
        # rounding may move a value to the next bucket, but never past a larger value
        return (value * self._per_step).astype(np.int64)


@dataclass(frozen=True)
class CandidateIndex:
    """Indices that find candidates without a loop over users or items.

    Attributes:
        items: videos and rooms of the world.
        video_draw: ids of videos in order of publication; the number of entries of a video is proportional to its
            popularity weight.
        shelf: ``[2, slots]``, begin and end in ``video_draw`` of the videos that are recommended in each five-minute
            slot.
        taste: ``[items, d] float32``, the subspace of the items' vectors that the policy ranks by.
        slot_room: ids of the rooms that are open at the start of each five-minute slot, slot after slot.
        slot_weight: ``[len(slot_room) + 1]``, cumulative popularity of ``slot_room``.
        slot_search: search in ``slot_weight``.
        slot_first: ``[slots + 1]``, offsets of the slots in ``slot_room``.
        by_author: per domain, ids sorted by author, then start.
        author_search: per domain, search in the sort keys of ``by_author``.
        span_ms: time from the oldest item to the end of the world, in whole days.
    """

    items: Items
    video_draw: np.ndarray
    shelf: np.ndarray
    taste: np.ndarray
    slot_room: np.ndarray
    slot_weight: np.ndarray
    slot_search: BucketSearch
    slot_first: np.ndarray
    by_author: tuple[np.ndarray, np.ndarray]
    author_search: tuple[BucketSearch, BucketSearch]
    span_ms: int

    def popular_videos(self, time_ms: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Draw videos of the last ``SHELF_DAYS`` by popularity.

        ``time_ms [n]``, ``uniform [c, n]`` in [0, 1) -> ids ``[c, n]``.
        """
        low, high = self.shelf.take((time_ms - START_MS) // SLOT_MS, axis=1)
        return self.video_draw.take(low + ((high - low) * uniform).astype(np.int64))

    def popular_rooms(self, time_ms: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Draw open rooms by popularity.

        ``time_ms [n]``, ``uniform [c, n]`` in [0, 1) -> ids ``[c, n]``; -1 where no room is open.
        """
        slot = (time_ms - START_MS) // SLOT_MS
        low, high = self.slot_first[slot], self.slot_first[slot + 1]
        weight = self.slot_weight[low] + (self.slot_weight[high] - self.slot_weight[low]) * uniform
        drawn = np.minimum(self.slot_search.search(weight) - 1, len(self.slot_room) - 1)
        return np.where(high > low, self.slot_room.take(drawn), -1)

    def latest_by_author(
        self, domain: int, author: np.ndarray, time_ms: np.ndarray, back: int | np.ndarray
    ) -> np.ndarray:
        """Return the author's latest item started by ``time_ms``, or the one ``back`` positions earlier.

        ``author [f, n]``, ``time_ms [n]`` -> ids ``[f, n]``; -1 where the author has no such item.
        """
        position = self.author_search[domain].search(_author_key(author, time_ms, self.span_ms)) - 1 - back
        item = self.by_author[domain].take(np.maximum(position, 0))
        return np.where((position >= 0) & (self.items.author.take(item) == author), item, -1)


def make_candidate_index(config: WorldConfig, items: Items) -> CandidateIndex:
    """Index the items by time, popularity and author."""
    videos, n = items.videos, len(items.author)
    weight = [np.exp(scale * items.popularity.astype(np.float64)) for scale in POPULARITY_WEIGHT]
    slots = config.days * DAY_MS // SLOT_MS
    start = np.clip(-(-(items.start_ms[videos:] - START_MS) // SLOT_MS), 0, slots)
    end = np.clip(-(-(items.end_ms[videos:] - START_MS) // SLOT_MS), start, slots)
    length = end - start
    # one entry for each room and each slot at whose start it is open, then sorted by slot
    slot = np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())
    order = np.argsort(slot, kind="stable")
    slot_room = videos + np.repeat(np.arange(n - videos), length)[order]
    split = [np.arange(videos), np.arange(videos, n)]
    share = _cumulative(weight[VIDEO][:videos]) / weight[VIDEO][:videos].sum()
    draws = DRAWS_PER_VIDEO * videos
    # evenly spaced quantiles of the cumulative popularity give each video entries in proportion to its weight
    video_draw = np.searchsorted(share[1:-1], (np.arange(draws) + 0.5) / draws, side="right")
    opening = START_MS + SLOT_MS * np.arange(slots)
    drawn_start = items.start_ms[video_draw]
    shelf = [np.searchsorted(drawn_start, opening - age) for age in (SHELF_DAYS * DAY_MS, 0)]
    span_ms = (_OLDEST_DAYS + config.days) * DAY_MS
    keys = [_author_key(items.author[ids], items.start_ms[ids], span_ms) for ids in split]
    sort = [np.argsort(key, kind="stable") for key in keys]
    slot_weight = _cumulative(weight[LIVE][slot_room])
    video_search, live_search = (
        BucketSearch(keys[domain][sort[domain]], _BUCKET_MS, config.authors * span_ms) for domain in (VIDEO, LIVE)
    )
    return CandidateIndex(
        items=items,
        video_draw=video_draw,
        shelf=np.stack(shelf),
        taste=np.ascontiguousarray(items.vector[:, TASTE]),
        slot_room=slot_room,
        slot_weight=slot_weight,
        slot_search=BucketSearch(slot_weight, max(slot_weight[-1], 1) / len(slot_weight), slot_weight[-1]),
        slot_first=np.searchsorted(slot[order], np.arange(slots + 1)),
        by_author=(split[VIDEO][sort[VIDEO]], split[LIVE][sort[LIVE]]),
        author_search=(video_search, live_search),
        span_ms=span_ms,
    )


def choose_items(
    index: CandidateIndex,
    users: Users,
    rng: np.random.Generator,
    domain: int,
    user: np.ndarray,
    time_ms: np.ndarray,
    scene: np.ndarray,
    mood: np.ndarray,
    familiar: np.ndarray,
) -> np.ndarray:
    """Choose the next item that each user is shown.

    Args:
        index: candidates.
        users: users of the world; the policy uses their preferences.
        rng: random stream.
        domain: domain of the exposures.
        user: ``[n] int64``.
        time_ms: ``[n] int64`` request time, before the end of the world.
        scene: ``[n]`` codes of ``SCENES``.
        mood: ``[n]`` genre that the user currently prefers; the policy is assumed to infer it from recent views.
        familiar: ``[f, n] int64`` familiar authors of the users, ``f`` is ``FAMILIAR[domain]``.

    Returns:
        Item ids ``[n] int64``; -1 where no candidate room is open.
    """
    items, popular = index.items, POPULAR[domain]
    uniform = rng.random((popular, len(user)))
    if domain == LIVE:
        drawn, known = index.popular_rooms(time_ms, uniform), index.latest_by_author(domain, familiar, time_ms, back=0)
    else:
        back = rng.integers(0, LATEST_VIDEOS, familiar.shape)
        drawn, known = index.popular_videos(time_ms, uniform), index.latest_by_author(domain, familiar, time_ms, back)
    candidate = np.concatenate([drawn, known])
    if domain == LIVE:
        # also removes an author's latest room if that has closed already
        candidate[items.end_ms.take(candidate) - time_ms < LAST_CALL_MS] = -1
    interest = users.vector[domain].take(user, axis=0)[:, TASTE]
    score = np.einsum("nd,cnd->cn", interest, index.taste.take(candidate, axis=0))
    score *= TASTE_SCALE
    score += np.float32(MOOD_WEIGHT) * (items.genre.take(candidate) == mood)
    score[popular:] += FAMILIAR_WEIGHT + np.float32(FOLLOWING_TAB_WEIGHT) * (scene == FOLLOWING_TAB)
    # Of exponential variables with rates exp(score), each is the smallest with the probability of its softmax.
    waiting = rng.standard_exponential(score.shape, np.float32)
    waiting *= np.exp(-score)
    # A missing candidate is never the smallest, except where all are missing; then the result is -1.
    waiting[candidate < 0] = np.inf
    return candidate[waiting.argmin(axis=0), np.arange(len(user))]


def _cumulative(weight: np.ndarray) -> np.ndarray:
    """Return the cumulative sums with a leading 0, ``[n + 1] float64``."""
    return np.concatenate([[0.0], np.cumsum(weight)])


def _author_key(author: np.ndarray, time_ms: np.ndarray, span_ms: int) -> np.ndarray:
    """Return a sort key that orders by author, then time."""
    return author * span_ms + (time_ms - START_MS + _OLDEST_DAYS * DAY_MS)
