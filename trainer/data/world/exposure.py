"""The exposure policy: what the platform shows to whom. Popularity, familiarity, preference and exploration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.world.config import DAY_MS, MINUTE_MS, START_MS, WorldConfig
from trainer.data.world.content import LIVE, SHELF_DAYS, VIDEO, Items
from trainer.data.world.population import TASTE, Users

POPULAR = (4, 9)
FAMILIAR = (1, 3)
"""Candidates drawn by popularity, and from the authors a user knows, for a video and for a live exposure."""

POPULARITY_WEIGHT = (0.6, 0.8)
TASTE_WEIGHT, MOOD_WEIGHT, FAMILIAR_WEIGHT = 0.6, 0.4, 0.5
"""The policy's score; it shows one of the candidates by the softmax of their scores, which explores."""
FOLLOWING_TAB_WEIGHT = 4.0
"""Added to familiar authors in the ``following`` scene."""

SCENES: tuple[str, ...] = ("unknown", "feed", "following", "nearby", "plaza")
"""Where an exposure happens; codes are positions. The plaza shows live rooms only."""
SCENE_SHARE = np.array([[0, 0.8, 0.08, 0.12, 0], [0, 0.55, 0.15, 0.1, 0.2]])
FEED, FOLLOWING_TAB, PLAZA = (SCENES.index(name) for name in ("feed", "following", "plaza"))

SLOT_MS = 5 * MINUTE_MS
LAST_CALL_MS = 2 * MINUTE_MS
"""A room is not recommended any more when it is about to close."""
DRAWS_PER_VIDEO = 8
"""Resolution of the popularity of videos: mean number of lots that a video has in the draw."""
LATEST_VIDEOS = 3
"""A familiar author's candidate is one of the latest so many videos, or the room that is open."""


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
        slot_first: ``[slots + 1]`` offsets of the slots.
        by_author: per domain, ids sorted by author, then start.
        author_key: per domain, the sort keys of ``by_author``.
    """

    items: Items
    video_draw: np.ndarray
    shelf: np.ndarray
    taste: np.ndarray
    slot_room: np.ndarray
    slot_weight: np.ndarray
    slot_first: np.ndarray
    by_author: tuple[np.ndarray, np.ndarray]
    author_key: tuple[np.ndarray, np.ndarray]

    def popular_videos(self, time_ms: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Videos of the last ``SHELF_DAYS`` by popularity. ``time_ms [n]``, ``uniform [c, n]`` -> ids ``[c, n]``."""
        low, high = self.shelf[:, (time_ms - START_MS) // SLOT_MS]
        return self.video_draw.take(low + ((high - low) * uniform).astype(np.int64))

    def popular_rooms(self, time_ms: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rooms by popularity, ids ``[c, n]``, and whether each is still open."""
        slot = (time_ms - START_MS) // SLOT_MS
        low, high = self.slot_first[slot], self.slot_first[slot + 1]
        weight = self.slot_weight[low] + (self.slot_weight[high] - self.slot_weight[low]) * uniform
        drawn = np.clip(np.searchsorted(self.slot_weight, weight, side="right") - 1, 0, len(self.slot_room) - 1)
        room = self.slot_room[drawn]
        return room, (high > low) & (self.items.end_ms[room] - time_ms >= LAST_CALL_MS)

    def of_author(
        self, domain: int, author: np.ndarray, time_ms: np.ndarray, back: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The latest item of an author started by ``time_ms``, or ``back`` before it, and whether there is one."""
        ids = self.by_author[domain]
        at = np.searchsorted(self.author_key[domain], _author_key(author, time_ms), side="right") - 1 - back
        item = ids[np.maximum(at, 0)]
        return item, (at >= 0) & (self.items.author[item] == author)


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
    keys = [_author_key(items.author[ids], items.start_ms[ids]) for ids in split]
    sort = [np.argsort(key, kind="stable") for key in keys]
    return Catalogue(
        items=items,
        video_draw=video_draw,
        shelf=np.stack(shelf),
        taste=np.ascontiguousarray(items.vector[:, TASTE]),
        slot_room=slot_room,
        slot_weight=_cumulative(weight[LIVE][slot_room]),
        slot_first=np.searchsorted(slot[order], np.arange(slots + 1)),
        by_author=(split[VIDEO][sort[VIDEO]], split[LIVE][sort[LIVE]]),
        author_key=(keys[VIDEO][sort[VIDEO]], keys[LIVE][sort[LIVE]]),
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
        drawn, drawn_open = catalogue.popular_rooms(time_ms, uniform)
        known, known_open = catalogue.of_author(domain, familiar, time_ms, back=0)
        known_open &= items.end_ms[known] - time_ms >= LAST_CALL_MS
    else:
        drawn, drawn_open = catalogue.popular_videos(time_ms, uniform), np.ones(uniform.shape, bool)
        back = rng.integers(0, LATEST_VIDEOS, familiar.shape)
        known, known_open = catalogue.of_author(domain, familiar, time_ms, back)
    candidate = np.concatenate([drawn, known])
    eligible = np.concatenate([drawn_open, known_open])
    interest = users.vector[domain].take(user, axis=0)[:, TASTE]
    taste = np.einsum("nd,cnd->cn", interest, catalogue.taste.take(candidate, axis=0))
    score = np.float32(TASTE_WEIGHT / np.sqrt(catalogue.taste.shape[1])) * taste
    score += np.float32(MOOD_WEIGHT) * (items.genre.take(candidate) == mood)
    score[popular:] += (FAMILIAR_WEIGHT + FOLLOWING_TAB_WEIGHT * (scene == FOLLOWING_TAB)).astype(np.float32)
    # of clocks with rates exp(score), the first to ring is drawn from the softmax of the scores
    ring = rng.standard_exponential(score.shape, np.float32) * np.exp(-score)
    ring[~eligible] = np.inf
    first = ring.argmin(axis=0)
    here = np.arange(len(user))
    return np.where(eligible[first, here], candidate[first, here], -1)


def _cumulative(weight: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(weight)])


def _author_key(author: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Sorts by author, then time; 2^40 ms are 34 years."""
    return (author.astype(np.int64) << 40) + (time_ms - START_MS + (SHELF_DAYS + 1) * DAY_MS)
