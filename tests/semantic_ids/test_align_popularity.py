"""Positives by author and time, against their definition: only earlier rows count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
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
