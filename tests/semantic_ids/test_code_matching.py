"""Matching of codes one to one: a permutation that keeps nearly as many segments as the best one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from trainer.semantic_ids.code_matching import kept_shares, match_codes, match_levels, renumber, reorder

CODES = st.integers(0, 6)


@given(st.lists(st.tuples(CODES, CODES), max_size=60))
def test_a_matching_is_a_permutation_and_keeps_at_least_half_of_the_best(pairs: list[tuple[int, int]]) -> None:
    old, new = np.array(pairs, np.int32).reshape(-1, 2).T
    number = match_codes(old, new, 7)
    assert sorted(number.tolist()) == list(range(7))
    counts = np.zeros((7, 7), np.int64)
    np.add.at(counts, (old, new), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    kept = int((number[new] == old).sum())
    assert 2 * kept >= counts[rows, columns].sum() and kept >= counts.trace()
    # The order of the segments does not matter.
    assert match_codes(old[::-1], new[::-1], 7).tolist() == number.tolist()


def test_a_permuted_codebook_is_matched_back() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 50, (2000, 3)).astype(np.int32)
    permutations = [rng.permutation(50) for _ in range(3)]
    new = renumber(old, permutations)
    assert kept_shares(old, new).tuple < 0.01
    numbers = match_levels(old, new, (50, 50, 50))
    assert renumber(new, numbers).tolist() == old.tolist()
    centroids = rng.standard_normal((50, 4))
    assert np.array_equal(reorder(reorder(centroids, permutations[0]), numbers[0]), centroids)


def test_greedy_keeps_nearly_as_much_as_the_best() -> None:
    """Clusters of one world from two starts: large clusters agree, the others overlap in several."""
    rng = np.random.default_rng(1)
    points = rng.standard_normal((4000, 2))
    centroids = [points[rng.choice(4000, 80, replace=False)] for _ in range(2)]
    old, new = (((points[:, None] - at) ** 2).sum(-1).argmin(1) for at in centroids)
    counts = np.zeros((80, 80), np.int64)
    np.add.at(counts, (old, new), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    kept = int((match_codes(old, new, 80)[new] == old).sum())
    assert 0.97 * counts[rows, columns].sum() <= kept


def test_ties_go_to_the_smaller_codes_and_unused_codes_to_free_numbers() -> None:
    old, new = np.array([1, 1, 2, 2]), np.array([3, 0, 3, 0])
    # All four pairs have one segment: (1, 0) comes first, then (2, 3); the codes 1 and 2 get the numbers left.
    assert match_codes(old, new, 4).tolist() == [1, 0, 3, 2]


def test_shares_are_by_level_and_of_tuples() -> None:
    old = np.array([[1, 1], [1, 2], [2, 2], [0, 0]])
    new = np.array([[1, 1], [1, 0], [0, 2], [1, 1]])
    shares = kept_shares(old, new)
    assert shares.levels == (0.5, 0.5) and shares.tuple == pytest.approx(0.25)
    assert shares.document() == {"levels": [0.5, 0.5], "tuple": 0.25}


def test_numbers_that_keep_as_much_stay() -> None:
    # Greedy takes the pair of 3 segments, and keeps 3; the numbers of the fit keep 2 + 2.
    old, new = np.array([0, 0, 0, 0, 0, 1, 1]), np.array([1, 1, 1, 0, 0, 1, 1])
    assert match_codes(old, new, 2).tolist() == [0, 1]
    assert match_codes(np.array([0, 1]), np.array([1, 0]), 3).tolist() == [1, 0, 2]
