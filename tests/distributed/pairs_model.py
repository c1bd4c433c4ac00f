"""Two towers over pairs of users and authors, their data, and their plain training in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.author_fusion import TowerInputs, TwoTowers
from modules.embeddings import Lookup, Table, initial_rows
from tests.modules.softmax_reference import softmax_loss
from trainer.data.loading.batch import RankingBatch

SEED, STEPS, MOST, LONGEST = 3, 6, 8, 3
"""Maximum number of rows of a rank in a step (``MOST``), and of entries of a history (``LONGEST``)."""
LOOKUPS = (
    Lookup("user", "user", 1),
    Lookup("author", "author", 1),
    Lookup("side", "side", 2),
    Lookup("seen", "author", None),
)
KEYS = tuple(lookup.name for lookup in LOOKUPS)
SIZES = {"user": (12, 4), "author": (9, 4), "side": (6, 4)}
VECTOR, TEMPERATURE = 3, 0.2
TABLE_RATE, DENSE_RATE, CLIPPING = 0.3, 0.02, 0.3
INPUTS = TowerInputs(
    user_lookups=("user",),
    user_ids={"side": (0,)},
    user_dense=(),
    histories=(("seen",),),
    author_id="author",
    author_ids={"side": (1,)},
    author_dense=(0,),
    content=1,
    vector_dim=VECTOR,
)


def tables(sharding: str) -> list[Table]:
    return [Table(name, *size, init_scale=0.3, sharding=sharding) for name, size in SIZES.items()]  # type: ignore[arg-type]


def make_towers() -> TwoTowers:
    torch.manual_seed(SEED)
    return TwoTowers(
        INPUTS,
        dict.fromkeys(("user", "author", "side"), 4),
        {"seen": 4},
        {"user": 1, "author": 1, "side": 2},
        dim=5,
        user_widths=(8,),
        author_widths=(8,),
        gate_widths=(),
    )


@dataclass(frozen=True)
class Pairs:
    """Pairs of a step: lookup name -> the ids of each row, and the rest of a batch."""

    ids: dict[str, list[Tensor]]
    dense: Tensor
    user_id: Tensor
    author_id: Tensor
    log_q: Tensor

    def batch(self, start: int, stop: int) -> RankingBatch:
        flat = [ids for name in KEYS for ids in self.ids[name][start:stop]]
        keyed = KeyedJaggedTensor(
            keys=list(KEYS),
            values=torch.cat([*flat, torch.empty(0, dtype=torch.int64)]),
            lengths=torch.tensor([len(ids) for ids in flat], dtype=torch.int64),
            stride=stop - start,
            length_per_key=[sum(len(ids) for ids in self.ids[name][start:stop]) for name in KEYS],
        )
        none, user = torch.zeros(stop - start, 0), self.user_id[start:stop]
        return RankingBatch(
            [keyed],
            self.dense[start:stop],
            none,
            none,
            user,
            user,
            user,
            stop - start,
            author_id=self.author_id[start:stop],
            log_q=self.log_q[start:stop],
            left_out_rows=2 * (stop - start) + 1,
        )


def steps() -> list[Pairs]:
    """Steps of unequal size with several rows of a user and of an author, of which the last one has no row."""
    found = []
    for step in range(STEPS):
        random = torch.Generator().manual_seed(step)
        rows = 0 if step == STEPS - 1 else 2 * MOST - 3 * step
        user, author = (torch.randint(0, high, (rows,), generator=random) for high in (6, 5))
        lengths = torch.randint(0, LONGEST + 1, (rows,), generator=random).tolist()
        dense = torch.randn(rows, 1 + 2 * VECTOR + 2, generator=random)
        dense[:, -2:] = (dense[:, -2:] > -0.5).float()
        of_row = {
            "user": [value[None] for value in user],
            "author": [value[None] for value in author],
            "side": [torch.randint(0, 6, (2,), generator=random) for _ in range(rows)],
            "seen": [torch.randint(0, 9, (n,), generator=random) for n in lengths],
        }
        found.append(Pairs(of_row, dense, user, author, torch.randn(rows, generator=random)))
    return found


def batches_of(rank: int, world: int) -> Iterator[RankingBatch]:
    """Yield a rank's batches; the second of two ranks has fewer pairs, then none, and runs out before the first."""
    for step, pairs in enumerate(steps()):
        n = len(pairs.dense)
        cut = n if world == 1 else n - min(n // 3, max(0, 4 - step))
        if rank == 0:
            yield pairs.batch(0, cut)
        elif step < STEPS - 1:
            yield pairs.batch(cut, n)


class PlainPairTraining:
    """Training in one process with plain PyTorch: SGD for tables, AdamW for the towers, clipping like the engine."""

    def __init__(self, clipping: float) -> None:
        self.towers, self.clipping = make_towers(), clipping
        self.tables = {
            table.name: initial_rows(table, SEED, 0, table.rows).requires_grad_() for table in tables("auto")
        }
        self.adam = torch.optim.AdamW(self.towers.parameters(), DENSE_RATE, weight_decay=0.0)

    def step(self, pairs: Pairs) -> float:
        """Return the mean loss of the pairs, 0 if there are none."""
        n = len(pairs.dense)
        found = {lookup.name: [self.tables[lookup.table][ids] for ids in pairs.ids[lookup.name]] for lookup in LOOKUPS}
        embedded = {name: torch.cat([*parts, torch.zeros(0, 4)]) for name, parts in found.items()}
        lengths = {"seen": torch.tensor([len(part) for part in found["seen"]], dtype=torch.int64)}
        output = self.towers(embedded, lengths, pairs.dense)
        losses = softmax_loss(
            output[:, :5],  # type: ignore[arg-type]
            output[:, 5:10],  # type: ignore[arg-type]
            pairs.log_q.tolist(),
            pairs.user_id.tolist(),
            pairs.author_id.tolist(),
            TEMPERATURE,
        )
        loss = torch.stack([output.sum() * 0, *losses]).sum() / max(n, 1)
        self.adam.zero_grad()
        for table in self.tables.values():
            table.grad = torch.zeros_like(table)
        loss.backward()
        factor = 1.0
        if self.clipping:
            norm = float(nn.utils.clip_grad_norm_(self.towers.parameters(), self.clipping))
            factor = min(1.0, self.clipping / (norm + 1e-6))
        self.adam.step()
        with torch.no_grad():
            for table in self.tables.values():
                assert table.grad is not None
                table -= TABLE_RATE * factor * table.grad
        return float(loss.detach())

    def parameters(self) -> dict[str, Tensor]:
        named = self.tables | dict(self.towers.named_parameters())
        return {name: parameter.detach() for name, parameter in named.items()}


@dataclass(frozen=True)
class PairWay:
    """Variant of training that must agree with :class:`PlainPairTraining`."""

    sharding: str = "row_wise"
    stage: int = 1
    parts: int = 1
    clipping: float = 0.0


PAIR_WAYS = {
    "row_wise": PairWay(),
    "table_wise": PairWay("table_wise", 0),
    "accumulated": PairWay(parts=3),
    "accumulated, clipped, ZeRO 2": PairWay("table_wise", 2, parts=3, clipping=CLIPPING),
}
