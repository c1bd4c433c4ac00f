"""Allowed shardings of a table, checked before TorchRec's planner runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata

from modules.embeddings import Dynamic, Lookup, Table
from modules.table_set import TableSet
from trainer.console.errors import UserError
from trainer.sparse import planner
from trainer.sparse.dynamic_ids import ID_BYTES
from trainer.sparse.planner import (
    SMALL_TABLE_BYTES,
    TableOptimizer,
    _cut_between_buckets,
    describe_plan,
    format_plan,
    make_plan,
    make_sharder,
    sharding_types,
)


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


@pytest.mark.parametrize("world", [2, 8, 16])
def test_small_tables_are_not_cut_on_gpus(world: int) -> None:
    rows = SMALL_TABLE_BYTES // 64
    small, large = Table("t", rows, 16), Table("t", rows + 1, 16)
    optimizer = TableOptimizer("sgd", 0.1)
    assert sharding_types(small, optimizer, world, "cuda") == ["table_wise"]
    assert sharding_types(large, optimizer, world, "cuda") == ["table_wise", "row_wise"]
    assert sharding_types(replace(small, sharding="row_wise"), optimizer, world, "cuda") == ["row_wise"]


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
        (Table("t", 9, 12, sharding="column_wise"), "sgd", 2, "12 columns cannot be cut"),
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


GIGABYTE = 1 << 30
HBM = 139 * GIGABYTE
"""Memory of an H200."""

BATCH, DIM, HISTORIES, LENGTH = 8192, 64, 5, 20
LOOKUPS = (
    *(Lookup(name, name, 1) for name in ("user", "item", "author")),
    Lookup("side", "side", 3),
    *(Lookup(f"h{i}_{key}", key, None, max_length=LENGTH) for i in range(HISTORIES) for key in ("item", "author")),
)


class Planned(NamedTuple):
    """Plan of :func:`plan_on_gpus`, and the planner's estimate of the memory that each table needs on each rank."""

    sharding: dict[str, str]
    kernels: dict[str, str]
    rows: dict[str, list[int]]
    memory: dict[str, dict[int, int]]


def plan_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    rows: tuple[int, int, int],
    lookups: tuple[Lookup, ...] = LOOKUPS,
    dim: int = DIM,
    kind: Literal["sgd", "adagrad", "rowwise_adagrad"] = "rowwise_adagrad",
    dynamic: tuple[str, ...] = (),
) -> Planned:
    """Plan tables ``user``, ``item``, ``author`` and ``side`` as the first of ``world`` ranks would, 8 on a machine."""
    chosen: list[Any] = []

    class Recorded(planner.EmbeddingShardingPlanner):
        """Planner whose chosen options stay known."""

        def plan(self, *arguments: Any, **options: Any) -> Any:
            found = super().plan(*arguments, **options)
            chosen.extend(self._best_plan or [])
            return found

    monkeypatch.setattr(planner, "EmbeddingShardingPlanner", Recorded)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=HBM))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: world)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *arguments, **options: None)
    names = ("user", "item", "author", "side")
    ids = {name: Dynamic(2, "recency") for name in dynamic}
    declared = [Table(name, n, dim, dynamic=ids.get(name)) for name, n in zip(names, (*rows, 400), strict=True)]
    tables = TableSet(declared, lookups, "meta")
    optimizer = TableOptimizer(kind, 0.01)
    control: Any = None
    plan = make_plan(
        tables,
        make_sharder(optimizer, index_dedup=True),
        optimizer,
        device=torch.device("cuda", 0),
        local_size=min(world, 8),
        batch_size=BATCH,
        control=control,
    )
    assert not any(hasattr(parameter, "_optimizer_classes") for parameter in tables.parameters())
    described = {entry["table"]: entry for entry in describe_plan(plan, tables.tables)}
    return Planned(
        {name: entry["sharding"] for name, entry in described.items()},
        {name: entry["kernel"] for name, entry in described.items()},
        {name: [size[0] for size in entry["shards"]] for name, entry in described.items()},
        {option.name: {shard.rank: shard.storage.hbm for shard in option.shards} for option in chosen},
    )


@pytest.mark.parametrize(
    ("world", "rows", "cut"),
    [
        (1, (10**8, 10**8, 10**7), set()),
        (8, (10**8, 10**8, 10**7), {"item", "author"}),
        (8, (10**9, 2 * 10**9, 10**8), {"user", "item", "author"}),
        (16, (10**9, 2 * 10**9, 10**8), {"user", "item", "author"}),
    ],
)
def test_tables_of_a_gpu_job_fit_and_small_ones_stay_whole(
    monkeypatch: pytest.MonkeyPatch, world: int, rows: tuple[int, int, int], cut: set[str]
) -> None:
    planned = plan_on_gpus(monkeypatch, world, rows)
    assert planned.sharding["side"] == "table_wise", "400 rows on several ranks would be messages and nothing else"
    assert all(planned.sharding[name] == "row_wise" for name in cut)
    assert all(len(planned.rows[name]) == world for name in cut)
    assert {name: sum(of_table) for name, of_table in planned.rows.items()} == dict(
        zip(("user", "item", "author", "side"), (*rows, 400), strict=True)
    )
    assert set(planned.kernels.values()) == {"fused"}
    for rank in range(world):
        assert sum(of_table.get(rank, 0) for of_table in planned.memory.values()) < 0.85 * HBM


def test_every_id_of_a_sequence_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the table and its optimizer, a rank needs memory for the ids that it gets and the rows that it returns."""
    rows = (10**8, 10**8, 10**7)
    planned = plan_on_gpus(monkeypatch, 8, rows)
    unknown = tuple(replace(lookup, max_length=None) for lookup in LOOKUPS)
    without = plan_on_gpus(monkeypatch, 8, rows, unknown)
    ids = BATCH * (1 + HISTORIES * LENGTH)
    for name in ("item", "author"):
        # 8 bytes for an id, 4 * DIM for its row; cut by rows, a rank serves an eighth of the ids of all eight ranks.
        table = max(planned.rows[name]) * (4 * DIM + 4)
        assert max(planned.memory[name].values()) >= table + ids * (8 + 4 * DIM) * 0.9, name
        assert max(without.memory[name].values()) < max(planned.memory[name].values())


def test_the_state_of_the_optimizer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (10**8, 10**8, 10**7)
    memory = {
        kind: plan_on_gpus(monkeypatch, 8, rows, kind=kind).memory["item"][0]
        for kind in ("sgd", "rowwise_adagrad", "adagrad")
    }
    of_rank = rows[1] // 8
    assert memory["rowwise_adagrad"] - memory["sgd"] == pytest.approx(4 * of_rank, rel=1e-3)
    assert memory["adagrad"] - memory["sgd"] == pytest.approx(4 * DIM * of_rank, rel=1e-3)


def test_tables_that_are_larger_than_a_gpu_lie_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    host_memory = {"SC_PHYS_PAGES": 1 << 28, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(planner, "os", SimpleNamespace(sysconf=host_memory.__getitem__))
    planned = plan_on_gpus(monkeypatch, 1, (4 * 10**8, 10**9, 10**7))
    assert planned.kernels["item"] in ("fused_uvm", "fused_uvm_caching") and planned.kernels["side"] == "fused"
    assert sum(of_table[0] for of_table in planned.memory.values()) < 0.85 * HBM


def test_dynamic_tables_and_their_ids_fit_into_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never into host memory, behind a cache; and the ids take memory that the planner does not know."""
    host_memory = {"SC_PHYS_PAGES": 1 << 28, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(planner, "os", SimpleNamespace(sysconf=host_memory.__getitem__))
    rows = (1000, int(0.8 * HBM) // (4 * DIM + 4), 1000)
    assert set(plan_on_gpus(monkeypatch, 1, rows).kernels.values()) == {"fused"}
    with pytest.raises(UserError, match=r"no sharding of .* GB of tables on 1 ranks"):
        plan_on_gpus(monkeypatch, 1, rows, dynamic=("item",))
    smaller = (1000, int(0.8 * HBM) // (4 * DIM + 4 + ID_BYTES), 1000)
    assert set(plan_on_gpus(monkeypatch, 1, smaller, dynamic=("item",)).kernels.values()) == {"fused"}


def test_a_width_that_fbgemm_cannot_read_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"table 'user': dim = 6 is not a multiple of 4$"):
        plan_on_gpus(monkeypatch, 1, (1000, 1000, 1000), dim=6)


def test_torchrec_does_not_cut_unpooled_tables_within_a_machine() -> None:
    """If this fails, TorchRec has learnt it, and ``auto`` should offer it on several machines."""
    assert "table_row_wise" not in make_sharder(TableOptimizer("sgd", 0.1)).sharding_types("cuda")


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
