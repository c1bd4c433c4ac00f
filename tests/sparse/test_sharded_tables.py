"""Sharded tables in one process; tests/distributed/test_engine.py tests them on several ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Dynamic, Lookup, Table, initial_rows
from tests.device_waits import HOST_ONLY, Waits
from tests.forked import forked
from tests.memory_flags import memory_flags
from trainer.console.errors import UserError
from trainer.runtime.distributed import World
from trainer.runtime.large_pages import large_pages_setting, without_copies_in_children
from trainer.runtime.phase_timer import PhaseClock
from trainer.sparse import flat_exchange
from trainer.sparse.device_ids import DeviceIds
from trainer.sparse.flat_exchange import FlatExchange
from trainer.sparse.planner import TableOptimizer
from trainer.sparse.sharded_tables import ShardedTables

TABLES = [Table("user", 10, 4, sharding="row_wise"), Table("item", 7, 4), Table("wide", 5, 8)]
LOOKUPS = [
    Lookup("user", "user", 1),
    Lookup("item", "item", 1),
    Lookup("seen", "item", None),
    Lookup("wide", "wide", 1),
]


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


def make(
    world: World,
    optimizer: TableOptimizer,
    declared: list[Table] = TABLES,
    *,
    device_form: bool = False,
    deduplicate: bool = True,
) -> ShardedTables:
    lookups = [lookup for lookup in LOOKUPS if lookup.table in {table.name for table in declared}]
    return ShardedTables(
        declared,
        lookups,
        optimizer,
        device=world.device,
        local_size=1,
        batch_size=4,
        seed=3,
        clock=PhaseClock(world.device),
        control=world.control,
        device_form=device_form,
        deduplicate=deduplicate,
    )


def ids(**of_key: list[int]) -> KeyedJaggedTensor:
    rows = len(of_key["user"])
    lengths = [1] * rows + [1] * rows + [len(of_key["seen"]), *[0] * (rows - 1)]
    return KeyedJaggedTensor(
        keys=["user", "item", "seen"],
        values=torch.tensor([*of_key["user"], *of_key["item"], *of_key["seen"]]),
        lengths=torch.tensor(lengths),
    )


WIDE = KeyedJaggedTensor(keys=["wide"], values=torch.tensor([4, 0]), lengths=torch.tensor([1, 1]))


@pytest.mark.skipif(large_pages_setting() not in ("always", "madvise"), reason="this system has no large pages")
def test_tables_and_states_are_in_large_pages(world: World) -> None:
    table = Table("user", 70_000, 16)
    sharded = make(world, TableOptimizer("adagrad", 0.5), [table])
    ((shard, states),) = [(values, states) for _, values, states in sharded._held().values()]
    assert torch.equal(shard, initial_rows(table, 3, 0, table.rows))
    assert not states[0].any()
    assert "hg" in memory_flags(shard)
    assert "hg" in memory_flags(states[0])


def test_loader_processes_get_no_tables_and_no_states(world: World) -> None:
    sharded = make(world, TableOptimizer("adagrad", 0.5), [Table("user", 140_000, 16)])
    ((shard, states),) = [(values, states) for _, values, states in sharded._held().values()]
    memories = [shard, *states]
    assert len(memories) == 2
    with without_copies_in_children():
        assert all("dc" in memory_flags(values) for values in memories)
        child = forked()
        child.__enter__()
    assert not any("dc" in memory_flags(values) for values in memories)
    before = shard.clone()
    rows = torch.arange(0, 140_000, 7)
    keyed = KeyedJaggedTensor(keys=["user"], values=rows, lengths=torch.ones_like(rows, dtype=torch.int32))
    (exchange,) = sharded.exchanges([keyed])
    exchange.start()
    exchange.send()
    exchange.rows()
    exchange.update({"user": [torch.ones(len(rows), 16)]}, 1.0)
    child.__exit__(None, None, None)
    assert (shard[rows] != before[rows]).all()


@pytest.mark.parametrize("path", ["cpu", "torchrec"])
def test_rows_have_initial_values_and_are_trained(world: World, path: str) -> None:
    sharded = make(world, TableOptimizer("sgd", 0.5), device_form=path == "torchrec")
    user, item, wide = (initial_rows(table, 3, 0, table.rows) for table in TABLES)
    exchanges = sharded.exchanges([ids(user=[9, 2], item=[6, 6], seen=[0, 6, 0]), WIDE])
    found = {}
    for exchange in exchanges:
        exchange.start()
    for exchange in exchanges:
        exchange.send()
        found |= exchange.rows()
    assert found.keys() == {"user", "item", "seen", "wide"}
    for name, expected in (
        ("user", user[[9, 2]]),
        ("item", item[[6, 6]]),
        ("seen", item[[0, 6, 0]]),
        ("wide", wide[[4, 0]]),
    ):
        assert torch.equal(found[name], expected)
        assert not found[name].requires_grad

    gradients = {name: [torch.ones_like(rows[:1]), torch.ones_like(rows[1:])] for name, rows in found.items()}
    for exchange in exchanges:
        exchange.update(gradients, 2.0)
    after = {name: shard for name, shard, _, _ in sharded.shards()}
    user[[9, 2]] -= 0.5 * 2.0
    item[0] -= 0.5 * 2.0 * 2
    item[6] -= 0.5 * 2.0 * 3
    wide[[4, 0]] -= 0.5 * 2.0
    for name, rows in (("user", user), ("item", item), ("wide", wide)):
        torch.testing.assert_close(after[name], rows)


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("form", ["cpu", "beside dynamic tables", "torchrec"])
@pytest.mark.parametrize(
    ("user", "seen", "message"),
    [
        ([10, 0], [], "id 10 is not a row of table 'user', which has 10"),
        ([0, -1], [], "id -1 is not a row of table 'user', which has 10"),
        ([9, 0], [6, 7], "id 7 is not a row of table 'item', which has 7"),
        ([9, 0], [0, -(2**63)], f"id {-(2**63)} is not a row of table 'item', which has 7"),
        ([2**63 - 1, 0], [0], f"id {2**63 - 1} is not a row of table 'user', which has 10"),
    ],
)
def test_an_id_outside_its_table_is_an_error(
    world: World, user: list[int], seen: list[int], message: str, form: str, deduplicate: bool
) -> None:
    """A GPU finds it without waiting, and nothing is looked up or trained on it."""
    # The wide table has another width, and so an exchange of its own.
    declared = [*TABLES[:2], replace(TABLES[2], dim=4, dynamic=Dynamic(1, "recency"))]
    dynamic = form == "beside dynamic tables"
    sharded = make(
        world,
        TableOptimizer("rowwise_adagrad", 0.1),
        declared if dynamic else TABLES,
        device_form=form != "cpu",
        deduplicate=deduplicate,
    )
    keyed = ids(user=user, item=[0, 0], seen=seen)
    if dynamic:
        keyed = KeyedJaggedTensor.concat([keyed, WIDE])
    before = [shard.values.clone() for shard in sharded.shards()]
    with pytest.raises(UserError) as raised:
        for exchange in sharded.exchanges([keyed] if dynamic else [keyed, WIDE]):
            exchange.start()
            exchange.send()
    assert str(raised.value) == message
    assert all(torch.equal(shard.values, values) for shard, values in zip(sharded.shards(), before, strict=True))


def test_a_refused_sharding_is_an_error_before_anything_is_allocated(world: World) -> None:
    with pytest.raises(UserError, match="data_parallel"):
        make(world, TableOptimizer("sgd", 0.1), [Table("user", 1 << 40, 4, sharding="data_parallel")])


def test_tables_that_do_not_fit_into_memory_are_an_error(world: World) -> None:
    with pytest.raises(UserError, match=r"no sharding of 17,592\.2 GB of tables on 1 ranks") as raised:
        make(world, TableOptimizer("sgd", 0.1), [Table("user", 1 << 40, 4)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["cpu", "torchrec"])
def test_making_exchanges_sends_nothing(world: World, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = make(world, TableOptimizer("sgd", 0.5), device_form=path == "torchrec")
    sent: list[torch.Tensor] = []

    def all_to_all(exchange: FlatExchange, outgoing: torch.Tensor, *sizes: list[int]) -> tuple[torch.Tensor, None]:
        sent.append(outgoing)
        return outgoing, None

    def input_dist(collection: object, context: object, keyed: KeyedJaggedTensor) -> None:
        sent.append(keyed.values())

    monkeypatch.setattr(FlatExchange, "_all_to_all", all_to_all)
    monkeypatch.setattr(ShardedEmbeddingCollection, "input_dist", input_dist)
    exchanges = sharded.exchanges([ids(user=[9, 2], item=[6, 6], seen=[0, 6, 0]), WIDE])
    assert not sent
    for exchange in exchanges:
        exchange.start()
    # On a CPU there is one exchange for each sharding of a collection.
    assert len(sent) == {"cpu": 3, "torchrec": 2}[path]


def test_learning_rate(world: World) -> None:
    sharded = make(world, TableOptimizer("sgd", 0.5), TABLES[:1])
    keyed = KeyedJaggedTensor(keys=["user"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    ((_, table, _, _),) = sharded.shards()
    for rate in (0.25, 0.0):
        before = table.clone()
        sharded.set_learning_rate(rate)
        (exchange,) = sharded.exchanges([keyed])
        exchange.start()
        exchange.send()
        exchange.rows()
        exchange.update({"user": [torch.ones(1, 4)]}, 1.0)
        torch.testing.assert_close(before - table, torch.zeros(10, 4).index_fill(0, torch.tensor([1]), rate))


@pytest.mark.parametrize("device_form", [False, True])
def test_dynamic_ids_need_whole_rows_in_all_tables_of_their_width(world: World, device_form: bool) -> None:
    user, item, wide = TABLES
    declared = [replace(user, dynamic=Dynamic(1, "recency")), replace(item, sharding="column_wise"), wide]
    with pytest.raises(UserError, match="table 'user': dynamic ids need all tables of the same width"):
        make(world, TableOptimizer("sgd", 0.5), declared, device_form=device_form)


@pytest.mark.parametrize("device_form", [False, True])
def test_a_dynamic_table_takes_any_id_and_reads_row_0_of_those_without_a_row(world: World, device_form: bool) -> None:
    declared = [replace(TABLES[0], dynamic=Dynamic(2, "recency")), *TABLES[1:]]
    sharded = make(world, TableOptimizer("sgd", 0.5), declared, device_form=device_form)
    whole = initial_rows(TABLES[0], 3, 0, 10)
    far = -(2**63)
    for step, served in ((1, False), (2, True), (None, True)):
        found = {}
        for exchange in sharded.exchanges([ids(user=[far, far], item=[0, 0], seen=[]), WIDE]):
            exchange.start()
            exchange.send()
            found |= exchange.rows(step)
        assert torch.equal(found["user"][0], found["user"][1])
        assert torch.equal(found["user"][0], whole[0]) is not served
        assert bool((found["user"][0] == whole).all(1).any())
    counts = sharded.dynamic.counts()["user"]
    assert (counts.looked_up, counts.unserved, counts.admitted, counts.evicted) == (2, 1, 1, 0)


def test_rows_and_gradients_next_to_dynamic_tables_do_not_wait_for_a_gpu(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for the numbers of unique ids alone, before the step; Triton's kernel admits without waiting."""
    # fbgemm keeps its counters in the memory of the host.
    host_only = HOST_ONLY - {("trainer/sparse/", "")} | {("fbgemm_gpu/", "")}
    monkeypatch.setattr("tests.device_waits.HOST_ONLY", host_only)
    monkeypatch.setattr(DeviceIds, "_admit_in_rounds", lambda self, ids, buckets, step: (ids * 0 - 1, ids.sum() * 0))
    declared = [replace(TABLES[0], dynamic=Dynamic(2, "recency")), *TABLES[1:]]
    keyed = ids(user=[9, 2], item=[6, 6], seen=[0, 6, 0])
    # A batch brings these numbers along.
    assert keyed.length_per_key() == [2, 2, 3]
    exchange, _ = make(world, TableOptimizer("sgd", 0.5), declared, device_form=True).exchanges([keyed, WIDE])
    with Waits() as waits:
        exchange.start()
    assert waits.calls == ["_unique2 in dedup_exchange.py:unique_ids_on_device"] * 2
    exchange.send()
    with Waits() as waits:
        rows = exchange.rows(1)
        exchange.update({name: [of_key] for name, of_key in rows.items()}, 1.0)
    assert waits.calls == []


def test_ids_are_awaited_on_the_stream_that_has_sorted_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This stream may use the memory of the sent ids again, but not before they are sent."""
    current: list[object] = []
    awaited: list[list[object]] = []

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(flat_exchange, "on_stream", on_stream)
    monkeypatch.setattr(flat_exchange, "pass_to_current_stream", lambda source, tensors: None)
    monkeypatch.setattr(FlatExchange, "_wait", lambda exchange: awaited.append(list(current)))
    sharded = make(world, TableOptimizer("sgd", 0.5))
    for last, expected in (("rows", [["copies"], []]), ("drain", [["copies"]])):
        exchange: Any = sharded.exchanges([ids(user=[9, 2], item=[6, 6], seen=[0, 6, 0]), WIDE])[0]
        exchange.start()
        exchange.send()
        awaited.clear()
        flat = exchange._exchanges[0]
        flat._stream = "copies"
        getattr(flat, last)()
        assert awaited == expected
