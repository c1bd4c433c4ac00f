"""The exposure policy: what the platform shows to whom. Popularity, familiarity, preference and exploration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.simulator.config import DAY_MS, MINUTE_MS, START_MS, WorldConfig
from trainer.data.simulator.content import LIVE, SHELF_DAYS, VIDEO, Items
from trainer.data.simulator.population import TASTE, Users

POPULAR = (4, 9)
FAMILIAR = (1, 3)
"""Candidates drawn by popularity, and from the authors a user knows, for a video and for a live exposure."""

POPULARITY_WEIGHT = (0.6, 0.8)
TASTE_WEIGHT, MOOD_WEIGHT, FAMILIAR_WEIGHT = 0.6, 0.4, 0.5
TASTE_SCALE = np.float32(TASTE_WEIGHT / np.sqrt(TASTE.stop - TASTE.start))
"""The policy's score; it shows one of the candidates by the softmax of their scores, which explores."""
FOLLOWING_TAB_WEIGHT = 4.0
"""Added to familiar authors in the ``following`` scene."""

SCENES: tuple[str, ...] = ("unknown", "feed", "following", "nearby", "plaza")
"""Where an exposure happens; codes are positions. The plaza shows live rooms only."""
SCENE_SHARE = np.array([[0, 0.8, 0.08, 0.12, 0], [0, 0.55, 0.15, 0.1, 0.2]])
SCENE_EDGES = np.cumsum(SCENE_SHARE, axis=1)
FEED, FOLLOWING_TAB, PLAZA = (SCENES.index(name) for name in ("feed", "following", "plaza"))

SLOT_MS = 5 * MINUTE_MS
LAST_CALL_MS = 2 * MINUTE_MS
"""A room is not recommended any more when it is about to close."""
DRAWS_PER_VIDEO = 8
"""Resolution of the popularity of videos: mean number of lots that a video has in the draw."""
LATEST_VIDEOS = 3
"""A familiar author's candidate is one of the latest so many videos, or the room that is open."""

_OLDEST_DAYS = SHELF_DAYS + 1
_GUIDE_MS = DAY_MS // 2


class Guide:
    """Searches a sorted column from nearby, several times faster than by bisection and with the same result.

    Args:
        column: ``[n]`` sorted, from 0 on.
        step: width of a bucket of values; a search begins where the bucket does.
        end: no value that is searched for is larger.
    """

    def __init__(self, column: np.ndarray, step: float, end: float) -> None:
        self._per_step = 1 / step
        buckets = 2 + int(end * self._per_step)
        self._first = np.searchsorted(self._bucket(column), np.arange(buckets))
        self._column = np.append(column, np.inf if column.dtype.kind == "f" else np.iinfo(column.dtype).max)

    def search(self, value: np.ndarray) -> np.ndarray:
        """``np.searchsorted(column, value, side="right")``."""
        at = self._first.take(self._bucket(value))
        while (before := self._column.take(at) <= value).any():
            at += before
        return at

    def _bucket(self, value: np.ndarray) -> np.ndarray:
        # Rounding may move a value to the next bucket, but never past a larger value.
        return (value * self._per_step).astype(np.int64)


@dataclass(frozen=True)
class Catalogue:
    """Indices that find candidates without a loop over users or items.

    Attributes:
        items: what there is.
        video_draw: videos in order of publication, each as often as its popularity weighs.
        shelf: ``[2, slots]`` where in ``video_draw`` begins and ends what is on the shelf in each five minutes.
        taste: ``[items, d] float32``, the subspace of the items' vectors that the policy ranks by.
        slot_room: ids of the rooms that are open at the start of each five-minute slot, slot after slot.
        slot_weight: ``[len(slot_room) + 1]`` their cumulative popularity.
        slot_guide: searches ``slot_weight``.
        slot_first: ``[slots + 1]`` offsets of the slots.
        by_author: per domain, ids sorted by author, then start.
        author_guide: per domain, searches the sort keys of ``by_author``.
        span_ms: from the oldest item to the end of the world, in whole days.
    """

    items: Items
    video_draw: np.ndarray
    shelf: np.ndarray
    taste: np.ndarray
    slot_room: np.ndarray
    slot_weight: np.ndarray
    slot_guide: Guide
    slot_first: np.ndarray
    by_author: tuple[np.ndarray, np.ndarray]
    author_guide: tuple[Guide, Guide]
    span_ms: int

    def popular_videos(self, time_ms: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Videos of the last ``SHELF_DAYS`` by popularity. ``time_ms [n]``, ``uniform [c, n]`` -> ids ``[c, n]``."""
        low, high = self.shelf.take((time_ms - START_MS) // SLOT_MS, axis=1)
        return self.video_draw.take(low + ((high - low) * uniform).astype(np.int64))

    def popular_rooms(self, time_ms: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Rooms by popularity, ids ``[c, n]``; -1 where there is none."""
        slot = (time_ms - START_MS) // SLOT_MS
        low, high = self.slot_first[slot], self.slot_first[slot + 1]
        weight = self.slot_weight[low] + (self.slot_weight[high] - self.slot_weight[low]) * uniform
        drawn = np.minimum(self.slot_guide.search(weight) - 1, len(self.slot_room) - 1)
        return np.where(high > low, self.slot_room.take(drawn), -1)

    def of_author(self, domain: int, author: np.ndarray, time_ms: np.ndarray, back: int | np.ndarray) -> np.ndarray:
        """The latest item of an author started by ``time_ms``, or ``back`` before it; -1 where there is none."""
        at = self.author_guide[domain].search(_author_key(author, time_ms, self.span_ms)) - 1 - back
        item = self.by_author[domain].take(np.maximum(at, 0))
        return np.where((at >= 0) & (self.items.author.take(item) == author), item, -1)


def make_catalogue(config: WorldConfig, items: Items) -> Catalogue:
    """Index the items by time, popularity and author."""
    videos, n = items.videos, len(items.author)
    weight = [np.exp(scale * items.popularity.astype(np.float64)) for scale in POPULARITY_WEIGHT]
    slots = config.days * DAY_MS // SLOT_MS
    start = np.clip(-(-(items.start_ms[videos:] - START_MS) // SLOT_MS), 0, slots)
    end = np.clip(-(-(items.end_ms[videos:] - START_MS) // SLOT_MS), start, slots)
    length = end - start
    slot = np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())
    order = np.argsort(slot, kind="stable")
    slot_room = videos + np.repeat(np.arange(n - videos), length)[order]
    split = [np.arange(videos), np.arange(videos, n)]
    share = _cumulative(weight[VIDEO][:videos]) / weight[VIDEO][:videos].sum()
    draws = DRAWS_PER_VIDEO * videos
    video_draw = np.searchsorted(share[1:-1], (np.arange(draws) + 0.5) / draws, side="right")
    opening = START_MS + SLOT_MS * np.arange(slots)
    drawn_start = items.start_ms[video_draw]
    shelf = [np.searchsorted(drawn_start, opening - age) for age in (SHELF_DAYS * DAY_MS, 0)]
    span_ms = (_OLDEST_DAYS + config.days) * DAY_MS
    keys = [_author_key(items.author[ids], items.start_ms[ids], span_ms) for ids in split]
    sort = [np.argsort(key, kind="stable") for key in keys]
    slot_weight = _cumulative(weight[LIVE][slot_room])
    video_guide, live_guide = (
        Guide(keys[domain][sort[domain]], _GUIDE_MS, config.authors * span_ms) for domain in (VIDEO, LIVE)
    )
    return Catalogue(
        items=items,
        video_draw=video_draw,
        shelf=np.stack(shelf),
        taste=np.ascontiguousarray(items.vector[:, TASTE]),
        slot_room=slot_room,
        slot_weight=slot_weight,
        slot_guide=Guide(slot_weight, max(slot_weight[-1], 1) / len(slot_weight), slot_weight[-1]),
        slot_first=np.searchsorted(slot[order], np.arange(slots + 1)),
        by_author=(split[VIDEO][sort[VIDEO]], split[LIVE][sort[LIVE]]),
        author_guide=(video_guide, live_guide),
        span_ms=span_ms,
    )


def choose(
    catalogue: Catalogue,
    users: Users,
    rng: np.random.Generator,
    domain: int,
    user: np.ndarray,
    time_ms: np.ndarray,
    scene: np.ndarray,
    mood: np.ndarray,
    familiar: np.ndarray,
) -> np.ndarray:
    """What each user is shown next.

    Args:
        catalogue: candidates.
        users: preferences that the policy knows of.
        rng: random stream.
        domain: of the exposure.
        user: ``[n] int64``.
        time_ms: ``[n] int64`` request time, before the end of the world.
        scene: ``[n]`` codes of ``SCENES``.
        mood: ``[n]`` genre the user is after at the moment; the policy picks it up from what was just watched.
        familiar: ``[f, n] int64`` authors that the user knows, ``f`` as in ``FAMILIAR[domain]``.

    Returns:
        Item ids ``[n] int64``; -1 where no candidate room is open.
    """
    items, popular = catalogue.items, POPULAR[domain]
    uniform = rng.random((popular, len(user)))
    if domain == LIVE:
        drawn, known = catalogue.popular_rooms(time_ms, uniform), catalogue.of_author(domain, familiar, time_ms, back=0)
    else:
        back = rng.integers(0, LATEST_VIDEOS, familiar.shape)
        drawn, known = catalogue.popular_videos(time_ms, uniform), catalogue.of_author(domain, familiar, time_ms, back)
    candidate = np.concatenate([drawn, known])
    if domain == LIVE:
        candidate[items.end_ms.take(candidate) - time_ms < LAST_CALL_MS] = -1
    interest = users.vector[domain].take(user, axis=0)[:, TASTE]
    score = np.einsum("nd,cnd->cn", interest, catalogue.taste.take(candidate, axis=0))
    score *= TASTE_SCALE
    score += np.float32(MOOD_WEIGHT) * (items.genre.take(candidate) == mood)
    score[popular:] += FAMILIAR_WEIGHT + np.float32(FOLLOWING_TAB_WEIGHT) * (scene == FOLLOWING_TAB)
    # of clocks with rates exp(score), the first to ring is drawn from the softmax of the scores
    ring = rng.standard_exponential(score.shape, np.float32)
    ring *= np.exp(-score)
    # what there is not never rings: it is first only where there is nothing
    ring[candidate < 0] = np.inf
    return candidate[ring.argmin(axis=0), np.arange(len(user))]


def _cumulative(weight: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(weight)])


def _author_key(author: np.ndarray, time_ms: np.ndarray, span_ms: int) -> np.ndarray:
    """Sorts by author, then time."""
    return author * span_ms + (time_ms - START_MS + _OLDEST_DAYS * DAY_MS)
