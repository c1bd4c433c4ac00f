"""Small model, its data, and its plain single-process training as the reference of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from modules.table_set import TableSet
from tests.modules.whole_tables import fill_tables
from trainer.data.loading.batch import RankingBatch
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.runtime.distributed import World

SEED = 5
BEHAVIOURS = 3
N_DENSE = 4
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])
MAX_LENGTH = 5
STEPS = 12
ROWS = 12
"""Largest number of rows of a rank in a step."""
LOOKUPS = (
    Lookup("user", "user", 1),
    Lookup("item", "item", 1),
    Lookup("side", "side", 2),
    Lookup("seen", "item", None),
    Lookup("room", "room", None),
)


def tables(sharding: str) -> list[Table]:
    """Return tables of two widths, one shared with a sequence, one small; ``mixed`` mixes row- and table-wise."""
    of_table = dict.fromkeys(("user", "item", "side", "room"), sharding)
    if sharding == "mixed":
        of_table = {"user": "row_wise", "item": "table_wise", "side": "row_wise", "room": "table_wise"}
    sizes = {"user": (61, 8), "item": (40, 8), "side": (3, 8), "room": (17, 16)}
    return [
        Table(name, rows, dim, init="normal" if name == "side" else "uniform", init_scale=0.3, sharding=of_table[name])  # type: ignore[arg-type]
        for name, (rows, dim) in sizes.items()
    ]


class SmallRanker(nn.Module):
    """Small network with the interface of modules.ranker.Ranker that uses every input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8 + 8 + 16 + 8 + 16 + N_DENSE, 12)
        self.second = nn.Linear(12, BEHAVIOURS)

    def forward(self, embedded: dict[str, Tensor], lengths: dict[str, Tensor], dense: Tensor) -> Tensor:
        rows, dtype = len(dense), self.first.weight.dtype
        embedded = {name: values.to(dtype) for name, values in embedded.items()}
        pooled = []
        for name, of_row in lengths.items():
            owner = torch.repeat_interleave(torch.arange(rows), of_row)
            total = torch.zeros(rows, embedded[name].shape[1], dtype=dtype)
            pooled.append(total.index_add(0, owner, embedded[name]))
        fixed = [embedded[name].view(rows, 8 * ids) for name, ids in (("user", 1), ("item", 1), ("side", 2))]
        return self.second(torch.tanh(self.first(torch.cat([*fixed, *pooled, dense.to(dtype)], 1)))).float()


def ranker(network: str = "small") -> nn.Module:
    """Return the small network, or a ranker of a kind over the same inputs, both with fixed initial values."""
    torch.manual_seed(SEED)
    if network == "small":
        return SmallRanker()
    pooled = [lookup if lookup.length else replace(lookup, pooling="sum") for lookup in LOOKUPS]
    dims = {table.name: table.dim for table in tables("auto")}
    return Ranker(BEHAVIOURS, pooled, dims, N_DENSE, (), network, expert_layers=((12,),), tower=(5,))  # type: ignore[arg-type]


def single_engine(world: World, **changes: Any) -> HybridEngine:
    """Return the small model on a single rank; ``changes`` are arguments of the engine."""
    arguments: dict[str, Any] = {
        "tables": tables("auto"),
        "lookups": LOOKUPS,
        "ranker": ranker(),
        "table_optimizer": TableOptimizer("rowwise_adagrad", 0.1),
        "dense_optimizer": DenseOptimizer(0.01),
        "deepspeed": {},
        "loss": BehaviourLoss(WEIGHTS),
        "batch_size": 2 * ROWS,
        "device": world.device,
        "seed": 1,
    }
    return HybridEngine(**{**arguments, **changes})


@dataclass(frozen=True)
class Rows:
    """Rows of a step, before they are divided among ranks."""

    ids: dict[str, list[Tensor]]
    dense: Tensor
    label: Tensor
    mask: Tensor

    def batch(self, start: int, stop: int) -> RankingBatch:
        keyed = []
        for names in (("user", "item", "side", "seen"), ("room",)):
            chosen = {name: self.ids[name][start:stop] for name in names}
            flat = [ids for name in names for ids in chosen[name]]
            keyed.append(
                KeyedJaggedTensor(
                    keys=list(names),
                    values=torch.cat([*flat, torch.empty(0, dtype=torch.int64)]),
                    lengths=torch.tensor([len(ids) for ids in flat], dtype=torch.int64),
                    stride=stop - start,
                    length_per_key=[sum(len(ids) for ids in chosen[name]) for name in names],
                )
            )
        index = torch.arange(start, stop)
        inputs = self.dense[start:stop], self.label[start:stop], self.mask[start:stop]
        return RankingBatch(keyed, *inputs, index, index, index, stop - start, {0: [0, 0, stop]})

    def __len__(self) -> int:
        return len(self.dense)


def make_rows(step: int, rows: int) -> Rows:
    random = torch.Generator().manual_seed(1000 + step)

    def draw(high: int, lengths: list[int]) -> list[Tensor]:
        # The square makes some ids frequent, so that they repeat within a step and on both ranks.
        return [(torch.rand(n, generator=random) ** 2 * high).long() for n in lengths]

    lengths = torch.randint(0, MAX_LENGTH + 1, (2, rows), generator=random).tolist()
    return Rows(
        {
            "user": draw(61, [1] * rows),
            "item": draw(40, [1] * rows),
            "side": draw(3, [2] * rows),
            "seen": draw(40, lengths[0]),
            "room": draw(17, lengths[1]),
        },
        torch.randn(rows, N_DENSE, generator=random),
        (torch.rand(rows, BEHAVIOURS, generator=random) < 0.4).float(),
        (torch.rand(rows, BEHAVIOURS, generator=random) < 0.8).float(),
    )


def share_of_first_rank(step: int, rows: int, steps: int = STEPS) -> int:
    """Return the number of rows of the first of two ranks: equal or unequal shares, none, all; none at the end."""
    if step >= steps - 3:
        return 0
    return [rows // 2, 3, 0, rows, 1][step % 5]


@cache
def steps() -> tuple[Rows, ...]:
    """Return the rows of all ranks in each step; a rank never gets more than ``ROWS``."""
    sizes = [ROWS if step % 5 in (2, 3) or step >= STEPS - 3 else ROWS + 1 for step in range(STEPS)]
    return tuple(make_rows(step, rows) for step, rows in enumerate(sizes))


def batches_of(rank: int, world: int) -> Iterator[RankingBatch]:
    """Yield the batches of one of one or two ranks; the first of two runs out before the other."""
    for step, rows in enumerate(steps()):
        cut = len(rows) if world == 1 else share_of_first_rank(step, len(rows))
        if rank == 0 and world == 2 and step >= STEPS - 3:
            return
        yield rows.batch(0, cut) if rank == 0 else rows.batch(cut, len(rows))


class PlainTraining:
    """Training in one process with whole tables and plain PyTorch optimizers.

    Args:
        optimizer: optimizer of the tables: ``sgd``, ``adagrad`` or ``rowwise_adagrad``.
        clipping: largest norm of the dense gradient; the tables' gradient is scaled by the same factor. 0: no clipping.
        declared: tables; by default the tables of the small model.
        network: see :func:`ranker`.

    Attributes:
        rates: learning rates of the tables and of the dense network, from the next step on.
    """

    LEARNING_RATE, EPS = 0.1, 1e-3
    DENSE_RATE, WEIGHT_DECAY, BETAS = 0.01, 0.02, (0.9, 0.99)

    def __init__(self, optimizer: str, clipping: float, declared: Sequence[Table] = (), network: str = "small") -> None:
        self.tables = TableSet(declared or tables("auto"), LOOKUPS, device="cpu")
        fill_tables(self.tables, SEED)
        self.ranker = ranker(network)
        self.adam = torch.optim.AdamW(
            self.ranker.parameters(), self.DENSE_RATE, self.BETAS, weight_decay=self.WEIGHT_DECAY
        )
        self.kind, self.clipping = optimizer, clipping
        self.rates = self.LEARNING_RATE, self.DENSE_RATE
        self.accumulated = {
            name: torch.zeros_like(p[:, :1] if optimizer == "rowwise_adagrad" else p)
            for name, p in self.tables.named_parameters()
        }
        self.clipped = 0

    def predict(self, rows: Rows) -> Tensor:
        batch = rows.batch(0, len(rows))
        found = self.tables(batch.ids)
        embedded = {name: jagged.values() for name, jagged in found.items()}
        lengths = {name: found[name].lengths() for name in ("seen", "room")}
        return self.ranker(embedded, lengths, batch.dense)

    def step(self, rows: Rows, slow: Tensor | None = None) -> float:
        """Train one step, and return its loss; ``slow [rows]`` is True for rows that correct an earlier negative."""
        logits = self.predict(rows)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, rows.label, reduction="none")
        if slow is not None:
            p = torch.sigmoid(logits)
            losses = torch.where(slow[:, None], -(torch.log(p) - torch.log(1 - p)), losses)
        loss = (losses * rows.mask * WEIGHTS).sum() / len(rows)
        self.adam.zero_grad()
        self.tables.zero_grad()
        loss.backward()
        factor = 1.0
        if self.clipping:
            norm = float(nn.utils.clip_grad_norm_(self.ranker.parameters(), self.clipping))
            factor = min(1.0, self.clipping / (norm + 1e-6))
            self.clipped += factor < 1
        table_rate, self.adam.param_groups[0]["lr"] = self.rates
        self.adam.step()
        with torch.no_grad():
            for name, parameter in self.tables.named_parameters():
                gradient = parameter.grad * factor
                squared = gradient**2
                if self.kind == "rowwise_adagrad":
                    squared = squared.mean(1, keepdim=True)
                self.accumulated[name] += squared
                if self.kind != "sgd":
                    gradient = gradient / (self.accumulated[name].sqrt() + self.EPS)
                parameter -= table_rate * gradient
        return float(loss.detach())

    def parameters(self) -> dict[str, Tensor]:
        named = {name.split(".")[-2]: p.detach() for name, p in self.tables.named_parameters()}
        return named | {name: p.detach() for name, p in self.ranker.named_parameters()}
