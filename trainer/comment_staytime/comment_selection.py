"""Which comments stand for a visit, and what is said of them: as of the request, and nothing that came later.

The paper draws six comments from the most popular ones and from those that the user interacted with. Taken from the
same visit, the latter tell the outcome: an unpopular comment among the six would mean that the area was opened. So here
a visit's comments are

1. those of the video that the user touched in earlier visits, latest first, at most half of the places;
2. of those at the top of the area the most popular ones, by the likes that they had at the request; where a source
   does not tell these, in the order of display.

The rule ``touched`` puts those touched in this very visit first instead, for measuring what that leak is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

ABSENT = -1
"""Where there is no comment."""


@dataclass(frozen=True)
class CommentVisits:
    """Visits with their comments, in order of request. Comments are positions in one list of all comments.

    Attributes:
        user_id: ``[n]`` int64.
        item_id: ``[n]`` int64.
        request_ms: ``[n]`` int64.
        left_ms: ``[n]`` int64, when what was touched is known.
        shown: ``[n, s]`` int64 at the top of the area, padded with ``ABSENT``.
        likes: ``[n, s]`` int64, of these as of the request; ``ABSENT`` where not known.
        touched: ``[n, t]`` int64, padded with ``ABSENT``.
        comments: how many there are.
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
    """The comments of each visit, in an order that says nothing: ``[n, number]`` int64, padded with ``ABSENT``.

    Args:
        visits: all of them, for earlier ones say what was touched.
        number: of comments a visit.
        seed: of the order.
        rule: see above.
    """
    order = np.argsort(-visits.likes, axis=1, kind="stable")
    popular = np.take_along_axis(visits.shown, order, 1)
    first = visits.touched if rule == "touched" else _touched_before(visits, number // 2)
    chosen = _first_distinct(np.concatenate([first, popular], 1), number)
    return np.random.default_rng(seed).permuted(chosen, axis=1)


def touched_among(chosen: np.ndarray, visits: CommentVisits) -> np.ndarray:
    """Which of the comments ``chosen [n, k]`` the user touched in the visit, ``[n, k]`` bool."""
    hit = np.zeros(chosen.shape, bool)
    for column in visits.touched.T:
        hit |= (chosen == column[:, None]) & (column[:, None] >= 0)
    return hit


def popularity(visits: CommentVisits, rows: np.ndarray) -> np.ndarray:
    """What the visits ``rows`` (``[n]`` bool) say of every comment's popularity, ``[comments]`` float32.

    The most likes it was shown with; where a source does not tell likes, the number of times it was touched.
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
    """What the user touched under this video in visits that had ended at the request, latest first: ``[n, most]``."""
    n = len(visits.user_id)
    found = np.full((n, most), ABSENT, np.int64)
    row, place = np.nonzero(visits.touched >= 0)
    if not most or not len(row):
        return found
    # Touches and requests of a user and video side by side in time; at the same moment the touch comes first.
    asked = np.arange(n)
    rows = np.concatenate([row, asked])
    is_request = np.arange(len(rows)) >= len(row)
    times = np.concatenate([visits.left_ms[row], visits.request_ms])
    user, item = visits.user_id[rows], visits.item_id[rows]
    order = np.lexsort((is_request, times, item, user))
    user, item, is_request = user[order], item[order], is_request[order]
    new = np.append(True, (user[1:] != user[:-1]) | (item[1:] != item[:-1]))
    touches = np.cumsum(~is_request)
    before_pair: np.ndarray = (touches - ~is_request)[np.flatnonzero(new)][np.cumsum(new) - 1]
    touch = visits.touched[row, place][order[~is_request]]
    request = order[is_request] - len(row)
    stop, start = touches[is_request], before_pair[is_request]
    for back in range(most):
        at = stop - 1 - back
        some = at >= start
        found[request[some], back] = touch[at[some]]
    return found


def _first_distinct(offered: np.ndarray, number: int) -> np.ndarray:
    """The first ``number`` different comments of each row, padded with ``ABSENT``: ``[n, k] -> [n, number]``."""
    kept = offered >= 0
    for column in range(1, offered.shape[1]):
        kept[:, column] &= (offered[:, :column] != offered[:, [column]]).all(1)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :number]
    chosen = np.where(np.take_along_axis(kept, order, 1), np.take_along_axis(offered, order, 1), ABSENT)
    return np.pad(chosen, ((0, 0), (0, number - chosen.shape[1])), constant_values=ABSENT)
