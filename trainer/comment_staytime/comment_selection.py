"""Selection of the comments that represent a visit, from what was known at its request.

The paper draws six comments from the most popular ones and from those that the user interacted with. If the latter are
taken from the same visit, they leak the label: an unpopular comment among the six means that the user opened the
comment area. To touch a comment means to interact with it. Here, the comments of a visit are

1. comments of the video that the user touched in earlier visits, latest first, at most half of the places;
2. the most popular of the comments at the top of the area, by their likes at the request; by the order of display if
   the source has no likes.

The rule ``touched`` puts the comments touched in this very visit first instead, to measure the effect of the leak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.comment_staytime.earlier_events import earlier_events

ABSENT = -1
"""Padding of a list of comments."""


@dataclass(frozen=True)
class CommentVisits:
    """Visits with their comments, in order of request. A comment is a position in one list of all comments.

    Attributes:
        user_id: ``[n]`` int64.
        item_id: ``[n]`` int64.
        request_ms: ``[n]`` int64.
        left_ms: ``[n]`` int64, end of the stay; the touched comments are known from then on.
        shown: ``[n, s]`` int64, comments at the top of the area, padded with ``ABSENT``.
        likes: ``[n, s]`` int64, likes of the shown comments at the request; ``ABSENT`` if unknown.
        touched: ``[n, t]`` int64, comments that the user touched in the visit, padded with ``ABSENT``.
        comments: number of all comments.
    """

    user_id: np.ndarray
    item_id: np.ndarray
    request_ms: np.ndarray
    left_ms: np.ndarray
    shown: np.ndarray
    likes: np.ndarray
    touched: np.ndarray
    comments: int


def choose_comments(
    visits: CommentVisits, number: int, seed: int, rule: Literal["known", "touched"] = "known"
) -> np.ndarray:
    """Choose the comments of each visit.

    Args:
        visits: all visits, because earlier ones have the touched comments.
        number: number of comments of a visit.
        seed: seed of the order.
        rule: ``known`` or ``touched``, see above.

    Returns:
        ``[n, number]`` int64 in random order, so that the place of a comment has no information; padded with
        ``ABSENT``.
    """
    # Stable: comments without known likes keep the order of display.
    order = np.argsort(-visits.likes, axis=1, kind="stable")
    popular = np.take_along_axis(visits.shown, order, 1)
    first = visits.touched if rule == "touched" else _touched_before(visits, number // 2)
    chosen = _first_distinct(np.concatenate([first, popular], 1), number)
    return np.random.default_rng(seed).permuted(chosen, axis=1)


def touched_among(chosen: np.ndarray, visits: CommentVisits) -> np.ndarray:
    """Return a mask ``[n, k]`` bool of the ``chosen [n, k]`` comments that the user touched in the visit."""
    hit = np.zeros(chosen.shape, bool)
    for column in visits.touched.T:
        hit |= (chosen == column[:, None]) & (column[:, None] >= 0)
    return hit


def popularity(visits: CommentVisits, rows: np.ndarray) -> np.ndarray:
    """Compute every comment's popularity ``[comments]`` float32 from the visits ``rows`` (``[n]`` bool).

    It is the largest number of likes that the comment was shown with; if the source has no likes, the number of times
    it was touched.
    """
    shown, likes = visits.shown[rows], visits.likes[rows]
    known = (shown >= 0) & (likes >= 0)
    if known.any():
        most = np.zeros(visits.comments, np.int64)
        np.maximum.at(most, shown[known], likes[known])
        return most.astype(np.float32)
    touched = visits.touched[rows]
    return np.bincount(touched[touched >= 0], minlength=visits.comments).astype(np.float32)


def _touched_before(visits: CommentVisits, most: int) -> np.ndarray:
    """Find the last ``most`` comments that the user touched under this video in visits that ended before the request.

    Returns:
        ``[n, most]`` int64, latest first, padded with ``ABSENT``.
    """
    found = np.full((len(visits.user_id), most), ABSENT, np.int64)
    row, place = np.nonzero(visits.touched >= 0)
    order, first, stop = earlier_events((visits.user_id, visits.item_id), row, visits.left_ms[row], visits.request_ms)
    touch = visits.touched[row, place][order]
    for back in range(most):
        at = stop - 1 - back
        some = at >= first
        found[some, back] = touch[at[some]]
    return found


def _first_distinct(offered: np.ndarray, number: int) -> np.ndarray:
    """Return the first ``number`` distinct comments of each row, padded with ``ABSENT``: ``[n, k] -> [n, number]``."""
    # A comment is kept at its first place in the row only.
    kept = offered >= 0
    for column in range(1, offered.shape[1]):
        kept[:, column] &= (offered[:, :column] != offered[:, [column]]).all(1)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :number]
    chosen = np.where(np.take_along_axis(kept, order, 1), np.take_along_axis(offered, order, 1), ABSENT)
    return np.pad(chosen, ((0, 0), (0, number - chosen.shape[1])), constant_values=ABSENT)
