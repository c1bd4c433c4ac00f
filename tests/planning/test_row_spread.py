"""Spread of ids over rows: Zipf's law against sums and draws, counted ids, and what owners of shards get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.plans import even_plan
from trainer.planning.exchange_traffic import TableIds, expected_distinct, owned_shares, rank_traffic
from trainer.planning.row_spread import EVEN, RowSpread, counted_spread, zipf_ids


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("population", [1, 2, 700, 50_000])
def test_the_distinct_ids_are_the_sum_over_all_ids(population: int, exponent: float) -> None:
    ids = 3000
    weight = np.arange(1, population + 1, dtype=np.float64) ** -exponent
    expected = 1 - (1 - weight / weight.sum()) ** ids if population > 1 else np.ones(1)
    found, spread = zipf_ids(ids, population, exponent, deduplicate=True, ordered=True)
    assert found == pytest.approx(expected.sum(), rel=1e-3)
    half = spread.between(0, 0.5)
    first = expected[: population // 2].sum() + (0.5 * expected[population // 2] if population % 2 else 0)
    assert half == pytest.approx(first / expected.sum(), rel=5e-3, abs=1e-3)
    sent, of_ids = zipf_ids(ids, population, exponent, deduplicate=False, ordered=True)
    assert sent == pytest.approx(ids)
    if population > 1:
        assert of_ids.between(0, 1 / population) == pytest.approx(weight[0] / weight.sum(), rel=1e-3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_draws_have_as_many_distinct_ids_and_their_owners_as_many_as_the_law_says(seed: int) -> None:
    random, population, ids = np.random.default_rng(seed), 20_000, 5000
    weight = np.arange(1, population + 1) ** -1.1
    drawn = random.choice(population, ids, p=weight / weight.sum())
    distinct, spread = zipf_ids(ids, population, 1.1, deduplicate=True, ordered=True)
    unique = np.unique(drawn)
    assert distinct == pytest.approx(len(unique), rel=0.05)
    counted = counted_spread(unique, population)
    for place in (0.1, 0.25, 0.5):
        assert spread.between(0, place) == pytest.approx(counted.between(0, place), abs=0.03)


def test_without_skew_the_law_is_that_of_even_draws() -> None:
    found, spread = zipf_ids(4000, 10_000, 0.0, deduplicate=True, ordered=True)
    assert found == pytest.approx(expected_distinct(4000, 10_000), rel=1e-6)
    assert spread.between(0.3, 0.8) == pytest.approx(0.5)
    assert zipf_ids(10, 10**10, 1.0, deduplicate=True, ordered=False)[0] == pytest.approx(9.6, rel=0.1)
    assert zipf_ids(0, 5, 1.0, deduplicate=True, ordered=True) == (0.0, EVEN)


@given(st.integers(1, 5000), st.integers(1, 10**9), st.floats(0, 3), st.booleans(), st.booleans())
def test_shares_end_at_one_and_nothing_exceeds_the_ids(
    ids: int, population: int, exponent: float, deduplicate: bool, ordered: bool
) -> None:
    found, spread = zipf_ids(ids, population, exponent, deduplicate=deduplicate, ordered=ordered)
    assert 0 < found <= ids * (1 + 1e-9)
    assert not deduplicate or found <= population * (1 + 1e-9)
    assert spread.between(0, 1) == pytest.approx(1)
    assert (np.diff(spread.places) >= 0).all() and (np.diff(spread.shares) >= -1e-12).all()


def test_the_owner_of_popular_rows_serves_more_and_all_of_them_together_the_same() -> None:
    (table,) = even_plan([(100, 16)], 4, "row_wise")
    skewed = RowSpread((0.0, 0.25, 1.0), (0.0, 0.7, 1.0))
    assert [share for _, _, share in owned_shares(table, skewed)] == pytest.approx([0.7, 0.1, 0.1, 0.1])
    even, uneven = (rank_traffic([table], {"t0": TableIds(60, 40, spread)}, 4) for spread in (EVEN, skewed))
    assert uneven[0].served == pytest.approx(4 * 40 * 0.7) and even[0].served == pytest.approx(40)
    for name in ("served", "rows_out", "rows_in", "ids_out", "ids_in"):
        sums = [sum(getattr(of_rank, name) for of_rank in found) for found in (even, uneven)]
        assert sums[0] == pytest.approx(sums[1])
    # Whole tables, and tables that are cut by columns, have every row at each place.
    for sharding in ("table_wise", "column_wise"):
        (other,) = even_plan([(100, 16)], 4, sharding)
        assert all(share == pytest.approx(1) for _, _, share in owned_shares(other, skewed))


def test_counted_rows_are_where_they_are() -> None:
    spread = counted_spread(np.array([0, 1, 2, 99]), 100)
    assert spread.between(0, 0.5) == pytest.approx(0.75) and spread.between(0, 1) == pytest.approx(1)
    assert counted_spread(np.empty(0, np.int64), 100) == EVEN
