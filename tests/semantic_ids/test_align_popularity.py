"""Positives by author and time, against their definition: only earlier rows count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.semantic_ids.align_popularity import BUCKETS, AuthorPopularity, positive_rows


def make(pairs: list[tuple[int, int]], shown: set[int]) -> AuthorPopularity:
    """Popularity of (author, time) pairs, and of authors that were shown without a positive."""
    authors = np.array(sorted({author for author, _ in pairs} | shown), np.int64)
    ordered = sorted(pairs)
    bounds = [sum(author < each for author, _ in ordered) for each in authors.tolist()]
    return AuthorPopularity(
        authors, np.array([*bounds, len(pairs)], np.int64), np.array([time for _, time in ordered], np.int64)
    )


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), max_size=40)


@given(PAIRS, st.sets(st.integers(0, 8)), st.integers(0, 9), st.integers(-2, 35), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=80)
def test_the_correction_is_the_share_of_earlier_positives(
    pairs: list[tuple[int, int]], shown: set[int], author: int, now: int, smoothing: float
) -> None:
    popularity = make(pairs, shown)
    earlier = [each for each, time in pairs if time < now]
    expected = math.log((earlier.count(author) + smoothing) / (len(earlier) + smoothing * (len(set(earlier)) + 1)))
    found = popularity.log_q(np.array([author]), np.array([now]), smoothing)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    later = make([pair for pair in pairs if pair[1] < now] + [(author, now), (3, now + 5)], shown)
    assert later.log_q(np.array([author]), np.array([now]), smoothing) == found, "later positives change nothing"


@given(
    PAIRS,
    st.sets(st.integers(0, 8)),
    st.integers(0, 9),
    st.integers(-2, 45),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(1, 40),
)
@settings(max_examples=80)
def test_with_a_window_the_correction_is_the_share_since_the_first_positive_in_it(
    pairs: list[tuple[int, int]], shown: set[int], author: int, now: int, smoothing: float, window: int
) -> None:
    recent = [(each, time) for each, time in pairs if now - window <= time < now]
    own = [time for each, time in recent if each == author]
    # The first positive says that the author is on air; the share is that of the others since then.
    everyone = sum(time >= min(own) for _, time in recent) - 1 if own else 0
    authors = len({each for each, _ in recent})
    expected = math.log((max(len(own) - 1, 0) + smoothing) / (everyone + smoothing * (authors + 1)))
    found = make(pairs, shown).log_q(np.array([author]), np.array([now]), smoothing, window)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    other = [*recent, (author, now), (3, now + 5), (author, now - window - 1)]
    assert make(other, shown).log_q(np.array([author]), np.array([now]), smoothing, window) == found


def test_with_a_window_an_author_who_began_lately_has_its_share_on_air() -> None:
    # The first author has every second positive of a long time, and the second one of the last 100.
    pairs = [(k % 2, k) for k in range(10_000)] + [(2, 10_000 + k) for k in range(0, 100, 2)]
    pairs += [(0, 10_001 + k) for k in range(0, 100, 2)]
    popularity, now = make(pairs, set()), np.array([10_100, 10_100])
    whole, recent = (np.exp(popularity.log_q(np.array([0, 2]), now, 1.0, window)) for window in (None, 1_000))
    assert whole[1] < 0.01 and recent[1] == pytest.approx(50 / 103) and recent[0] > 0.45


@given(PAIRS, st.sets(st.integers(0, 8)))
def test_totals_and_buckets(pairs: list[tuple[int, int]], shown: set[int]) -> None:
    popularity = make(pairs, shown)
    authors = np.arange(-1, 11)
    counts = [sum(author == each for author, _ in pairs) for each in authors.tolist()]
    assert popularity.totals(authors).tolist() == counts
    known = popularity.known(authors)
    assert known.tolist() == [count > 0 for count in counts], "no other row of an author is trained on"
    place = popularity.buckets(authors)
    there = np.isin(authors, popularity.authors)
    assert ((place == 0) == ~there).all() and place.max(initial=0) < len(BUCKETS)
    sizes = np.bincount(place[there], minlength=len(BUCKETS))[1:]
    assert sizes.max() - sizes.min() <= 1
    ranked = sorted(zip(place[there].tolist(), popularity.totals(authors[there]).tolist(), strict=True))
    assert [count for _, count in ranked] == sorted(count for _, count in ranked), "rarer authors are in lower buckets"


def test_what_is_stored_is_read(tmp_path: Path) -> None:
    for pairs in ([(1, 5), (1, 7), (4, 2)], []):
        popularity = make(pairs, {9})
        popularity.save(tmp_path)
        stored = AuthorPopularity.load(tmp_path)
        for name in ("authors", "bounds", "emit_ms"):
            assert getattr(stored, name).tolist() == getattr(popularity, name).tolist()


def test_any_of_the_behaviours_makes_a_row_positive_if_its_label_counts() -> None:
    label = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], np.uint8)
    mask = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]], np.uint8)
    assert positive_rows({"label": label, "mask": mask}, [0, 2]).tolist() == [True, False, True, False]
