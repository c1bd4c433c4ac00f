"""Means of an author's first vectors against a sum of one vector after the other."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.features import author_means
from trainer.data.features.author_means import AuthorMeans


def plain_means(vectors: np.ndarray, order: np.ndarray, authors: np.ndarray, last: list[int]) -> np.ndarray:
    """Add in float64 from the author's first vector on, and divide."""
    found = np.empty((len(last), vectors.shape[1]), np.float32)
    for row, end in enumerate(last):
        total, count = np.zeros(vectors.shape[1]), 0
        for place in range(end + 1):
            if authors[place] == authors[end]:
                total += vectors[order[place]].astype(np.float64)
                count += 1
        found[row] = total / count
    return found


def read(means: AuthorMeans, last: np.ndarray, width: int) -> np.ndarray:
    out = np.full((len(last), width), np.nan, np.float32)
    means.read(last, out)
    return out


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("seed", range(3))
def test_means_equal_those_of_one_vector_after_the_other_bit_for_bit(
    seed: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(author_means, "BLOCK", int(rng.integers(1, 9)))
    monkeypatch.setattr(author_means, "ROWS_AT_ONCE", int(rng.integers(1, 40)))
    lengths = rng.integers(1, 30, 9)
    authors = np.repeat(np.arange(9) * 7, lengths)
    # Elements of very different sizes, so that another order of the additions would give other bits.
    vectors = (rng.standard_normal((len(authors) + 5, 3)) * 10.0 ** rng.integers(-3, 4, (len(authors) + 5, 3))).astype(
        dtype
    )
    order = rng.permutation(len(vectors))[: len(authors)]
    means = AuthorMeans(vectors, order, authors)
    last = rng.integers(0, len(authors), 200)
    np.testing.assert_array_equal(read(means, last, 3), plain_means(vectors, order, authors, last.tolist()))
    # A mean is the same whatever is read with it.
    np.testing.assert_array_equal(
        np.concatenate([read(means, last[cut], 3) for cut in np.array_split(np.arange(200), 7)]), read(means, last, 3)
    )


def test_later_vectors_of_an_author_and_other_authors_change_no_mean() -> None:
    rng = np.random.default_rng(1)
    vectors, authors = rng.standard_normal((400, 4)).astype(np.float32), np.repeat([3, 5, 8], [150, 200, 50])
    last = np.array([0, 63, 64, 130, 150, 277])
    before = read(AuthorMeans(vectors, np.arange(400), authors), last, 4)
    changed = vectors.copy()
    changed[131:150] = 7.0
    changed[278:] = -7.0
    np.testing.assert_array_equal(read(AuthorMeans(changed, np.arange(400), authors), last, 4), before)


def test_no_segments_and_no_means() -> None:
    none = np.zeros(0, np.int64)
    assert read(AuthorMeans(np.zeros((0, 4), np.float16), none, none), none, 4).shape == (0, 4)
    one = AuthorMeans(np.ones((1, 4), np.float16), np.zeros(1, np.int64), np.zeros(1, np.int64))
    one.prepare()
    assert read(one, none, 4).shape == (0, 4)
    assert read(one, np.zeros(2, np.int64), 4).tolist() == [[1.0] * 4] * 2
