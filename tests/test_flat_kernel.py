"""The kernel under the flat exchange: how many threads share the work changes no bit of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table
from trainer.clock import PhaseClock
from trainer.distributed import World
from trainer.sharding import TableOptimizer
from trainer.tables import ShardedTables

TABLES = [Table("user", 40, 4), Table("item", 25, 4)]
LOOKUPS = [Lookup("user", "user", 1), Lookup("seen", "item", None)]


@pytest.fixture
def world() -> Iterator[World]:
    with World.join("cpu") as alone:
        yield alone


def train(world: World, optimizer: str, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Rows found in each step, then the tables after the last."""
    sharded = ShardedTables(
        TABLES,
        LOOKUPS,
        TableOptimizer(optimizer, 0.3),  # type: ignore[arg-type]
        device=world.device,
        local_size=1,
        batch_size=8,
        seed=5,
        clock=PhaseClock(world.device),
        control=world.control,
    )
    seen = []
    for user, items in batches:
        lengths = torch.tensor([1] * len(user) + [len(items)] + [0] * (len(user) - 1))
        (exchange,) = sharded.start(
            [KeyedJaggedTensor(keys=["user", "seen"], values=torch.cat([user, items]), lengths=lengths)]
        )
        exchange.send()
        found = exchange.rows()
        seen += [found["user"].clone(), found["seen"].clone()]
        exchange.update({name: [(rows + 1).cos()] for name, rows in found.items()}, 0.7)
    after = {name: shard.clone() for name, shard, _, _ in sharded.shards()}
    return [*seen, after["user"], after["item"]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_threads_change_no_bit(world: World, optimizer: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    # Many ids are of the same row; the last two batches leave threads without any.
    batches = [(torch.randint(0, 40, (8,)), torch.randint(0, 25, (60,))) for _ in range(3)]
    batches += [(torch.tensor([4, 4]), torch.tensor([], dtype=torch.int64)), (torch.tensor([7]), torch.tensor([3]))]
    results = []
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(train(world, optimizer, batches))
    for other in results[1:]:
        for mine, alone in zip(other, results[0], strict=True):
            assert torch.equal(mine, alone)
    before, user = results[0][0], results[0][-2]
    assert bool((user[batches[0][0]] != before).all())
