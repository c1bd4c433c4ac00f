"""Formulas of the exchange: rules on generated plans, and equality with real ranks that are counted."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import RunRanks
from tests.planning.plans import even_plan
from trainer.planning.exchange_traffic import (
    ID,
    RankTraffic,
    TableIds,
    exchange_bytes,
    expected_distinct,
    rank_traffic,
)


@given(ids=st.integers(0, 10**6), rows=st.integers(1, 10**7))
def test_no_more_ids_are_distinct_than_there_are_ids_and_rows(ids: int, rows: int) -> None:
    found = expected_distinct(ids, rows)
    assert 0 <= found <= min(ids, rows) * (1 + 1e-9)
    assert found <= expected_distinct(ids + 1, rows)
    assert found <= expected_distinct(ids, rows + 1) + 1e-6


def test_distinct_ids_of_few_draws_are_counted_by_hand() -> None:
    # Two draws from two rows differ with probability 1/2.
    assert expected_distinct(2, 2) == pytest.approx(1.5)
    assert expected_distinct(1, 10**9) == pytest.approx(1)
    assert expected_distinct(10**9, 10) == pytest.approx(10)


PLANS = st.tuples(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from([4, 8, 16, 64])), min_size=1, max_size=4),
    st.sampled_from(["row_wise", "table_wise", "column_wise"]),
)


@given(PLANS, st.integers(0, 10**5), st.integers(0, 10**5))
def test_all_that_ranks_send_others_receive(
    drawn: tuple[int, list[tuple[int, int]], Any], ids: int, distinct: int
) -> None:
    world, sizes, sharding = drawn
    plan = even_plan(sizes, world, sharding)
    found = rank_traffic(plan, {table["table"]: TableIds(ids + distinct, distinct) for table in plan}, world)
    for out, into in (("ids_out", "ids_in"), ("rows_out", "rows_in")):
        assert sum(getattr(of_rank, out) for of_rank in found) == pytest.approx(
            sum(getattr(of_rank, into) for of_rank in found)
        )
    assert sum(of_rank.served for of_rank in found) == pytest.approx(sum(of_rank.distinct for of_rank in found))
    assert sum(of_rank.served_bytes for of_rank in found) == pytest.approx(sum(of_rank.own_bytes for of_rank in found))
    for of_rank in found:
        kept = of_rank.distinct - of_rank.ids_out / ID
        assert kept * world == pytest.approx(of_rank.served, abs=1e-6)
        assert all(value >= -1e-9 for value in of_rank)


@given(PLANS, st.integers(0, 10**5), st.booleans(), st.booleans())
def test_the_memory_of_an_exchange_grows_with_the_ids(
    drawn: tuple[int, list[tuple[int, int]], Any], ids: int, overlap: bool, deduplicate: bool
) -> None:
    world, sizes, sharding = drawn
    plan = even_plan(sizes, world, sharding)

    def memory(count: float) -> list[float]:
        of_table = {table["table"]: TableIds(count, count / 2 if deduplicate else count) for table in plan}
        return [
            exchange_bytes(of_rank, world, overlap=overlap, deduplicate=deduplicate)
            for of_rank in rank_traffic(plan, of_table, world)
        ]

    few, many = memory(ids), memory(2 * ids)
    for one, two in zip(few, many, strict=True):
        assert two == pytest.approx(2 * one) and one >= 0


def test_one_rank_sends_nothing_and_ids_in_flight_count_twice() -> None:
    plan = even_plan([(100, 16)], 1, "row_wise")
    (traffic,) = rank_traffic(plan, {"t0": TableIds(30, 20)}, 1)
    assert traffic.ids_out == traffic.ids_in == traffic.rows_out == traffic.rows_in == 0
    more = exchange_bytes(traffic, 1, overlap=True) - exchange_bytes(traffic, 1, overlap=False)
    assert more == 8 * (30 + 20 + 20 + 20) + 4 * 30


def test_a_table_in_host_memory_is_not_cached_on_the_device() -> None:
    plan = even_plan([(100, 16)], 4, "row_wise", kernel="fused_uvm_caching")
    for of_rank in rank_traffic(plan, {"t0": TableIds(30, 20)}, 4):
        assert of_rank.uncached_bytes == of_rank.served_bytes > 0


CASES = (
    (1, "auto", "rowwise_adagrad", "deduplicate"),
    (2, "auto", "rowwise_adagrad", "deduplicate"),
    (2, "table_wise", "adagrad", "deduplicate"),
    (2, "row_wise", "sgd", "plain"),
)


@pytest.mark.parametrize(("ranks", "sharding", "kind", "way"), CASES)
def test_real_ranks_hold_and_send_what_the_formulas_say(
    run_ranks: RunRanks, ranks: int, sharding: str, kind: str, way: str
) -> None:
    printed = run_ranks("tests.planning.exchange_ranks", sharding, kind, way, ranks=ranks)
    of_ranks = json.loads(printed.splitlines()[-1])
    assert len(of_ranks) == ranks
    for of_rank in of_ranks:
        for exact in ("plan", "tables", "optimizer", "collectives"):
            assert of_rank[exact][0] == of_rank[exact][1], exact
        # Ids are drawn at random, so their numbers differ from the expected ones by their spread.
        for counted in ("ids_out", "rows_out", "gradients_out"):
            assert of_rank[counted][0] == pytest.approx(of_rank[counted][1], rel=0.02), counted
        measured, planned = of_rank["exchange"]
        assert planned == pytest.approx(measured, rel=0.2), of_rank["exchange"]
    assert (of_ranks[0]["optimizer"][0] == 0) == (kind == "sgd")


def test_the_fields_of_the_traffic_are_finite_for_an_empty_batch() -> None:
    plan = even_plan([(100, 16)], 2, "row_wise")
    for of_rank in rank_traffic(plan, {"t0": TableIds(0, 0)}, 2):
        assert all(math.isfinite(value) for value in of_rank) and of_rank == RankTraffic(*([0.0] * len(of_rank)))
