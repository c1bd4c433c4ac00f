"""Effect of the next three minutes of a room on long views and gifts; an option of a world.

Without it, the behaviours of a visit depend on the segment that is on air at the request. What comes next then says no
more than that segment does. With it, users stay for what they are about to like, and give when it comes, so a model
that foresees the content of a room can predict these behaviours better.
"""

from __future__ import annotations

import numpy as np

from trainer.data.simulator.behaviours import GIFT, LONG_VIEW
from trainer.data.simulator.content import Items

SEGMENTS_AHEAD = 6
"""Number of segments after the one on air, three minutes in all."""
TASTE_WEIGHT = np.float32(0.5)
"""Weight of the user's taste for a topic in ``appeal_ahead``; that of its intensity alone is 1."""
WEIGHTS = {LONG_VIEW: 3.0, GIFT: 3.0}
"""Behaviour -> change of its log-odds per unit of ``appeal_ahead``."""
MEAN_APPEAL = 0.38
"""About the mean of ``appeal_ahead``, so that the base rates stay near those of a world without it."""


def appeal_ahead(items: Items, topic_taste: np.ndarray, item: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Return how much users will like the next segments of rooms, ``[n] float32``.

    It is the mean over the next ``SEGMENTS_AHEAD`` segments of the intensity times one plus ``TASTE_WEIGHT`` times the
    user's taste for the topic. Segments after the end of the room do not count. In the last segment of a room it is
    ``MEAN_APPEAL``.

    Args:
        items: the rooms.
        topic_taste: ``[n, topics] float32`` of the users.
        item: ``[n]`` rooms.
        time_ms: ``[n]`` times in them.
    """
    ahead = items.segment(item, time_ms) + np.arange(1, SEGMENTS_AHEAD + 1)[:, None]
    there = ahead < items.first_segment[item + 1]
    ahead = np.minimum(ahead, len(items.topic) - 1)
    return mean_appeal(items.intensity[ahead], topic_taste[np.arange(len(item)), items.topic[ahead]], there)


def mean_appeal(intensity: np.ndarray, taste: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return :func:`appeal_ahead` of given segments, ``[n] float32``.

    Args:
        intensity: ``[SEGMENTS_AHEAD, n] float32``.
        taste: ``[SEGMENTS_AHEAD, n] float32``, of the users for the topics.
        there: ``[SEGMENTS_AHEAD, n] bool``, False after the end of the room.
    """
    appeal = intensity * (1 + TASTE_WEIGHT * taste)
    count = there.sum(axis=0)
    mean = np.where(there, appeal, 0).sum(axis=0, dtype=np.float32) / np.maximum(count, 1).astype(np.float32)
    return np.where(count > 0, mean, np.float32(MEAN_APPEAL))


def add_lookahead(
    logits: np.ndarray, items: Items, topic_taste: np.ndarray, rows: np.ndarray, item: np.ndarray, time_ms: np.ndarray
) -> None:
    """Add the effect of the next three minutes to ``logits [behaviours, visits]`` in place.

    Args:
        logits: log-odds of ``behaviours.log_odds``.
        items: the rooms.
        topic_taste: ``[n, topics] float32`` of the users of the live visits.
        rows: ``[n]`` columns of ``logits`` that are live visits.
        item: ``[n]`` their rooms.
        time_ms: ``[n]`` their times.
    """
    add_appeal(logits, rows, appeal_ahead(items, topic_taste, item, time_ms))


def add_appeal(logits: np.ndarray, rows: np.ndarray, appeal: np.ndarray) -> None:
    """Add the effect of ``appeal [n]`` on the columns ``rows [n]`` of ``logits [behaviours, visits]`` in place."""
    appeal = appeal - np.float32(MEAN_APPEAL)
    for behaviour, weight in WEIGHTS.items():
        logits[behaviour, rows] += np.float32(weight) * appeal
