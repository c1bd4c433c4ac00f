"""Bytes of tables and of their optimizers. Equality with real tables: test_exchange_traffic.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.plans import even_plan
from trainer.planning.table_memory import CACHE_SHARE, optimizer_bytes, rank_tables, table_bytes

SIZES = st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([4, 16, 64])), min_size=1, max_size=4)
KINDS = st.sampled_from(["sgd", "adagrad", "rowwise_adagrad"])


@given(SIZES, KINDS, st.integers(1, 16), st.sampled_from(["row_wise", "table_wise"]))
def test_the_shards_of_all_ranks_are_the_whole_tables(
    sizes: list[tuple[int, int]], kind: Any, world: int, sharding: str
) -> None:
    found = rank_tables(even_plan(sizes, world, sharding), kind, world)
    assert sum(of_rank.tables for of_rank in found) == sum(table_bytes(*size) for size in sizes)
    assert sum(of_rank.optimizer for of_rank in found) == sum(optimizer_bytes(kind, *size) for size in sizes)
    assert all(of_rank.whole == of_rank.tables + of_rank.optimizer and not of_rank.host for of_rank in found)


@given(SIZES, KINDS, st.integers(1, 16))
def test_more_ranks_never_need_more_memory_of_a_rank(sizes: list[tuple[int, int]], kind: Any, world: int) -> None:
    def largest(ranks: int) -> int:
        return max(of_rank.whole for of_rank in rank_tables(even_plan(sizes, ranks, "row_wise"), kind, ranks))

    assert largest(world + 1) <= largest(world)


@given(st.integers(0, 10**9), st.sampled_from([4, 16, 64]))
def test_optimizers_keep_nothing_a_number_a_row_or_a_number_an_element(rows: int, dim: int) -> None:
    none, by_row, by_element = (optimizer_bytes(kind, rows, dim) for kind in ("sgd", "rowwise_adagrad", "adagrad"))
    assert none == 0 and by_row * dim == by_element == table_bytes(rows, dim)


@pytest.mark.parametrize(("kernel", "cached"), [("fused_uvm", 0.0), ("fused_uvm_caching", CACHE_SHARE)])
def test_tables_in_host_memory_leave_only_a_cache_on_the_device(kernel: str, cached: float) -> None:
    found = rank_tables(even_plan([(1000, 16)], 4, "row_wise", kernel), "rowwise_adagrad", 4)
    for of_rank in found:
        assert of_rank.tables == round(cached * 4 * 250 * 16) and of_rank.optimizer == 0
        assert of_rank.host == of_rank.whole == 4 * 250 * 17
