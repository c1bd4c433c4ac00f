"""Allowed shardings of a table, checked before TorchRec's planner runs."""

from itertools import accumulate, pairwise

import pytest
from torch.distributed._shard.metadata import ShardMetadata

from modules.embeddings import Dynamic, Table
from trainer.console.errors import UserError
from trainer.sparse.planner import TableOptimizer, _cut_between_buckets, format_plan, sharding_types


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_whole_and_cut_by_rows_are_always_allowed(kind: str, sharding: str, world: int) -> None:
    assert sharding_types(Table("t", 5, 6, sharding=sharding), TableOptimizer(kind, 0.1), world) == [sharding]


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_auto_allows_the_exact_shardings(kind: str) -> None:
    table = Table("t", 100, 16)
    assert sharding_types(table, TableOptimizer(kind, 0.1), 4) == ["table_wise", "row_wise"]
    assert sharding_types(table, TableOptimizer(kind, 0.1), 1) == ["table_wise"]


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
def test_columns_may_be_cut_under_elementwise_optimizers(kind: str) -> None:
    assert sharding_types(Table("t", 9, 16, sharding="column_wise"), TableOptimizer(kind, 0.1), 2) == ["column_wise"]


@pytest.mark.parametrize(
    ("table", "kind", "world", "reason"),
    [
        (Table("t", 9, 16, sharding="column_wise"), "rowwise_adagrad", 2, "an accumulator of its own"),
        (Table("t", 9, 16, sharding="column_wise"), "rowwise_adagrad", 1, "an accumulator of its own"),
        (Table("t", 9, 4, sharding="column_wise"), "sgd", 2, "4 columns cannot be cut"),
        (Table("t", 9, 18, sharding="column_wise"), "sgd", 3, "18 columns cannot be cut"),
        (Table("t", 9, 16, sharding="column_wise", dynamic=Dynamic(1, "both")), "sgd", 2, "belong to whole rows"),
        (Table("t", 9, 16, sharding="data_parallel"), "sgd", 2, "no fused kernel"),
        (Table("t", 9, 16, sharding="data_parallel"), "rowwise_adagrad", 1, "no fused kernel"),
    ],
)
def test_other_shardings_are_refused_with_the_reason(table: Table, kind: str, world: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        sharding_types(table, TableOptimizer(kind, 0.1), world)
    assert repr(table.name) in str(raised.value) and repr(table.sharding) in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "ranks", "sizes"),
    [
        (70, 2, [64, 6]),
        (300, 2, [192, 108]),
        (300, 4, [128, 128, 44, 0]),
        (64, 3, [64, 0, 0]),
        (1000, 3, [384, 384, 232]),
    ],
)
def test_dynamic_tables_are_cut_between_buckets(rows: int, ranks: int, sizes: list[int]) -> None:
    block = -(-rows // ranks)
    starts = [min(rows, block * rank) for rank in range(ranks + 1)]
    shards = [
        ShardMetadata([start, 0], [stop - start, 8], f"rank:{rank}/cpu")
        for rank, (start, stop) in enumerate(pairwise(starts))
    ]
    _cut_between_buckets(shards)
    assert [shard.shard_sizes for shard in shards] == [[size, 8] for size in sizes]
    assert [shard.shard_offsets for shard in shards] == [[first, 0] for first in accumulate([0, *sizes[:-1]])]


def test_a_plan_as_text() -> None:
    described = [
        {
            "table": "user",
            "rows": 1500,
            "dim": 16,
            "module": "collections.0",
            "sharding": "row_wise",
            "kernel": "fused",
            "ranks": [0, 1],
            "shards": [[1000, 16], [500, 16]],
        }
    ]
    (line,) = format_plan(described).splitlines()
    for word in ("user", "1,500 x 16", "row_wise", "fused", "rank 0: 1,000 x 16", "rank 1: 500 x 16"):
        assert word in line
