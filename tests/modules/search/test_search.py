"""Fast searches against their definition in plain PyTorch, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.search import reference, search
from modules.search.cpu_kernels import keep_best
from modules.search.search import SearchPart, SearchResult, SearchVectors

COLUMNS = 700
LENGTHS = [1, 2, 7, 100, 5000]


@pytest.fixture(params=[1, 2], ids="threads{}".format, autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_runs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of 0, 1 and more entries."""
    first = rng.integers(0, COLUMNS + 1, n)
    return first, np.minimum(first + rng.choice([0, 1, 3, COLUMNS], n), COLUMNS)


def make_vectors(rng: np.random.Generator, dtype: type, ties: bool) -> SearchVectors:
    """Vectors of values with few, or with many different dot products."""
    rows, width = int(rng.integers(2, 300)), 16 * int(rng.integers(1, 6))
    values = rng.integers(-1, 2, (rows, width)) if ties else rng.standard_normal((rows, width)) * 40
    values = values.clip(-128, 127).astype(dtype)
    values[0] = 0
    return SearchVectors(values, shift=int(rng.integers(0, 2)))


def same(found: SearchResult, expected: SearchResult) -> None:
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.at, expected.at)
    assert found.at.dtype == found.lengths.dtype == np.int64


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 12),
    dtype=st.sampled_from([np.float16, np.int8]),
    ties=st.booleans(),
    length=st.sampled_from(LENGTHS),
    narrow=st.booleans(),
    parts=st.integers(1, 2),
)
def test_top_is_its_definition(seed, n, dtype, ties, length, narrow, parts):
    rng = np.random.default_rng(seed)
    first, stop = make_runs(rng, n)

    def part() -> SearchPart:
        vectors = make_vectors(rng, dtype, ties)
        # Also ids without a vector, in the history and as candidates.
        beyond = len(vectors.values) + 3
        column = rng.integers(-1, beyond, COLUMNS).astype(np.int32 if narrow else np.int64)
        return SearchPart(column, rng.integers(-1, beyond, n), vectors)

    asked = (first, stop, length, *(part() for _ in range(parts)))
    same(search.top(*asked), reference.top(*asked))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 12), length=st.sampled_from(LENGTHS), require=st.integers(0, 7))
def test_hard_searches_are_their_definitions(seed, n, length, require):
    rng = np.random.default_rng(seed)
    first, stop = make_runs(rng, n)
    same(search.latest(first, stop, length), reference.latest(first, stop, length))
    asked = (first, stop, length, rng.integers(0, 5, COLUMNS), rng.integers(0, 6, n))
    same(search.same_author(*asked), reference.same_author(*asked))

    middle = COLUMNS // 2
    both = np.stack([rng.integers(0, middle, n), rng.integers(middle, COLUMNS, n)], axis=1)
    ends = np.minimum(both + rng.choice([0, 1, 3, COLUMNS], (n, 2)), [middle, COLUMNS])
    order = rng.permutation(COLUMNS).astype(np.int32)
    ordinal = np.concatenate([np.sort(order[:middle]), np.sort(order[middle:])])
    mixed = (both, ends, length, ordinal, rng.integers(0, 8, COLUMNS).astype(np.int32), require)
    same(search.latest_of_all(*mixed), reference.latest_of_all(*mixed))


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
@pytest.mark.parametrize("order", ["falling", "rising", "equal"])
def test_scores_in_the_worst_orders(dtype, order):
    """Every entry is better than all before it, so the short list is cut many times."""
    n, length = 9000, 50
    values = np.zeros((121, 16), dtype)
    values[:, 0] = np.arange(121)
    items = {"falling": 120 - np.arange(n) * 120 // n, "rising": np.arange(n) * 120 // n, "equal": np.full(n, 5)}[order]
    asked = (np.array([0]), np.array([n]), length, SearchPart(items, np.array([1]), SearchVectors(values)))
    found = search.top(*asked)
    same(found, reference.top(*asked))
    if order == "equal":
        assert found.at.tolist() == list(range(n - length, n))


def test_a_candidate_without_a_vector_finds_the_latest():
    rng = np.random.default_rng(0)
    vectors = make_vectors(rng, np.float16, ties=False)
    items = rng.integers(0, len(vectors.values), COLUMNS)
    first, stop = np.array([0, 10]), np.array([COLUMNS, 600])
    for unknown in (-7, 10**9):
        found = search.top(first, stop, 20, SearchPart(items, np.full(2, unknown), vectors))
        same(found, search.latest(first, stop, 20))


def test_half_scores_round_as_stated():
    """Sums of one large and many small values depend on the order: exact scores would find other entries."""
    rng = np.random.default_rng(1)
    values = (3 * rng.standard_normal((4000, 48))).astype(np.float16)
    values[:, 0] = 30_000
    values[0] = 0
    items, candidate = np.arange(4000), np.arange(1, 40)
    asked = (np.zeros(39, np.int64), np.full(39, 4000), 30, SearchPart(items, candidate, SearchVectors(values)))
    found = search.top(*asked)
    same(found, reference.top(*asked))
    exact = values.astype(np.float64) @ values[candidate].astype(np.float64).T
    best = [np.sort(np.lexsort((items, column))[-30:]) for column in exact.T]
    assert (found.at.reshape(39, 30) != np.array(best)).any(), "the rounding did not matter: nothing was shown"


@pytest.mark.parametrize("values", [np.zeros((3, 16), np.float32), np.zeros((3, 8), np.int8)])
def test_other_vectors_are_refused(values):
    none = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="search vectors must be"):
        search.top(none, none, 3, SearchPart(none, none, SearchVectors(values)))


def test_parts_of_two_types_are_refused():
    none = np.zeros(0, np.int64)
    parts = [SearchPart(none, none, SearchVectors(np.zeros((3, 16), dtype))) for dtype in (np.int8, np.float16)]
    with pytest.raises(ValueError, match="not 2 of 2"):
        search.top(none, none, 3, *parts)


@settings(deadline=None)
@given(
    # Also keys that differ in their lowest bits only, as those of entries with the same score do.
    keys=st.lists(
        st.one_of(st.integers(0, 2**64 - 1), st.integers(2**63, 2**63 + 300)), min_size=1, max_size=200, unique=True
    ),
    data=st.data(),
)
def test_the_best_keys_are_kept_in_their_order(keys, data):
    keep = data.draw(st.integers(1, len(keys)))
    most = data.draw(st.integers(keep, len(keys)))
    listed = np.array([*keys, 2**64 - 1], np.uint64)  # What lies behind the list does not count.
    kept, least = keep_best(listed, len(keys), keep, most)
    assert keep <= kept <= most
    best = sorted(keys, reverse=True)[:kept]
    assert listed[:kept].tolist() == [key for key in keys if key in best]
    assert least == best[-1]


def test_padding_changes_no_score():
    assert [search.padded_width(dim) for dim in (1, 16, 17, 64)] == [16, 16, 32, 64]
