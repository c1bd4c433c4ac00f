"""Selection of comments: compared with a plain reference, and never from the future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trainer.comment_staytime.comment_selection import (
    ABSENT,
    CommentVisits,
    choose_comments,
    popularity,
    touched_among,
)

SEEDS = range(4)
COMMENTS, ITEMS, USERS, DAYS = 60, 5, 6, 4


def log(seed: int, rows: int = 300, *, likes_known: bool = True) -> CommentVisits:
    """Visits of a few users to a few videos, so that users come back; a comment is under video (id mod 5)."""
    random = np.random.default_rng(seed)
    request = np.sort(random.integers(0, DAYS * 86_400_000, rows))
    item = random.integers(0, ITEMS, rows)
    top = np.full((rows, 8), ABSENT)
    likes = np.full((rows, 8), ABSENT)
    touched = np.full((rows, 3), ABSENT)
    for row in range(rows):
        own = random.permutation(np.arange(item[row], COMMENTS, ITEMS))
        many = random.integers(0, 9)
        top[row, :many] = own[:many]
        if likes_known:
            likes[row, :many] = random.integers(0, 5, many)
        some = random.integers(0, 3)
        touched[row, :some] = own[:some]
    return CommentVisits(
        user_id=random.integers(0, USERS, rows),
        item_id=item,
        request_ms=request,
        left_ms=request + random.integers(0, 7_200_000, rows),
        shown=top,
        likes=likes,
        touched=touched,
        comments=COMMENTS,
    )


def plain(visits: CommentVisits, row: int, number: int, rule: str) -> set[int]:
    """Select the comments of one visit by applying the rules one after the other."""
    now = visits.request_ms[row]
    first = [int(comment) for comment in visits.touched[row] if comment >= 0]
    if rule == "known":
        earlier = [
            (visits.left_ms[other], other, place, int(visits.touched[other, place]))
            for other in range(len(visits.user_id))
            for place in range(visits.touched.shape[1])
            if visits.touched[other, place] >= 0
            and (visits.user_id[other], visits.item_id[other]) == (visits.user_id[row], visits.item_id[row])
            and visits.left_ms[other] < now
        ]
        first = [entry[-1] for entry in sorted(earlier)[::-1][: number // 2]]
    there = [place for place in range(visits.shown.shape[1]) if visits.shown[row, place] >= 0]
    popular = [int(visits.shown[row, k]) for k in sorted(there, key=lambda k: -visits.likes[row, k])]
    return set(list(dict.fromkeys([*first, *popular]))[:number])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("likes_known", [True, False])
@pytest.mark.parametrize("rule", ["known", "touched"])
def test_the_comments_are_those_of_the_plain_rules(seed: int, likes_known: bool, rule: str) -> None:
    visits = log(seed, likes_known=likes_known)
    chosen = choose_comments(visits, 6, seed, rule)  # type: ignore[arg-type]
    assert chosen.shape == (300, 6)
    for row in range(len(chosen)):
        there = chosen[row][chosen[row] >= 0].tolist()
        assert len(there) == len(set(there))
        assert set(there) == plain(visits, row, 6, rule), row


def changed_after(visits: CommentVisits, moment: int, seed: int) -> CommentVisits:
    """Return the same log with other touches and likes in all visits that end after a moment."""
    random = np.random.default_rng(seed)
    later = visits.left_ms > moment
    touched, likes = visits.touched.copy(), visits.likes.copy()
    touched[later] = random.integers(0, COMMENTS, touched.shape)[later]
    later = visits.request_ms > moment
    likes[later] = np.where(visits.shown >= 0, random.integers(0, 99, likes.shape), ABSENT)[later]
    return replace(visits, touched=touched, likes=likes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("likes_known", [True, False])
@pytest.mark.parametrize("number", [3, 6, 10])
def test_nothing_later_than_the_request_is_looked_at(seed: int, likes_known: bool, number: int) -> None:
    visits = log(seed, likes_known=likes_known)
    row = 180
    other = changed_after(visits, int(visits.request_ms[row]), seed)
    before = choose_comments(visits, number, seed, "known")
    after = choose_comments(other, number, seed, "known")
    assert np.array_equal(before[: row + 1], after[: row + 1])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_visit_without_a_stay_does_not_show_its_own_touches(seed: int) -> None:
    """Some logs have interactions in visits whose stay is 0: they are known in the millisecond of the request."""
    visits = log(seed)
    visits = replace(visits, left_ms=visits.request_ms)
    nothing = replace(visits, touched=np.full_like(visits.touched, ABSENT))
    for row in range(0, 300, 10):
        silent = visits.touched.copy()
        silent[row] = ABSENT
        other = choose_comments(replace(visits, touched=silent), 6, seed)
        assert np.array_equal(choose_comments(visits, 6, seed)[row], other[row])
    assert not np.array_equal(choose_comments(visits, 6, seed), choose_comments(nothing, 6, seed))


def test_the_rule_touched_tells_the_outcome() -> None:
    """Show why it is not the default: a row's comments reveal that the area was opened."""
    visits = log(1)
    leaky = touched_among(choose_comments(visits, 6, 1, "touched"), visits)
    assert (leaky.sum(1) == (visits.touched >= 0).sum(1)).all()
    known = touched_among(choose_comments(visits, 6, 1, "known"), visits)
    assert known.sum() < leaky.sum()


def test_places_say_nothing() -> None:
    visits = log(1, rows=2000)
    chosen = choose_comments(visits, 6, 1, "known")
    full = (chosen >= 0).all(1)
    likes = np.array([dict(zip(visits.shown[row], visits.likes[row], strict=True)).get(c, 0) for row in
                      np.flatnonzero(full) for c in chosen[row]]).reshape(-1, 6)  # fmt: skip
    means = likes.mean(0)
    assert means.max() - means.min() < 4 * likes.std() / np.sqrt(len(likes))
    assert not np.array_equal(chosen, choose_comments(visits, 6, 2, "known"))


@pytest.mark.parametrize("seed", SEEDS)
def test_popularity_is_the_most_likes_seen_in_the_rows_or_else_a_count(seed: int) -> None:
    visits = log(seed)
    rows = np.random.default_rng(seed).random(300) < 0.5
    found = popularity(visits, rows)
    unseen = log(seed, likes_known=False)
    counted = popularity(unseen, rows)
    for comment in range(COMMENTS):
        seen = visits.likes[rows][visits.shown[rows] == comment]
        assert found[comment] == (seen.max() if len(seen) else 0)
        assert counted[comment] == (unseen.touched[rows] == comment).sum()


def test_no_comments_at_all() -> None:
    visits = log(1)
    nothing = np.full((300, 1), ABSENT)
    silent = replace(visits, shown=nothing, likes=nothing, touched=nothing)
    chosen = choose_comments(silent, 6, 1)
    assert chosen.shape == (300, 6) and (chosen == ABSENT).all()
    assert not touched_among(chosen, silent).any()
