"""Model with attention over three aligned histories, its data, and its plain training in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table, initial_rows
from modules.esu import SequenceAttention
from tests.modules.alignment_reference import alignment_loss
from trainer.data.loading.batch import RankingBatch
from trainer.engine.history_alignment import Alignment

SEED, STEPS, MOST, LONGEST = 3, 6, 8, 3
"""Maximum number of rows of a rank in a step (``MOST``), and of entries of a history (``LONGEST``)."""
HISTORIES = ("mixed", "short", "author")
LOOKUPS = (
    Lookup("user", "user", 1),
    *(Lookup(f"{name}_item", "item", None) for name in HISTORIES),
    *(Lookup(f"{name}_context", "side", None, ids_per_entry=2) for name in HISTORIES),
)
KEYS = tuple(lookup.name for lookup in LOOKUPS)
ALIGNMENT = Alignment(
    [[lookup for lookup in LOOKUPS if lookup.name.startswith(name)] for name in HISTORIES],
    weight=0.4,
    temperature=0.2,
    symmetric=True,
    detached="none",
)
SIZES = {"user": (12, 4), "item": (15, 4), "side": (6, 4)}
TABLE_RATE, DENSE_RATE, CLIPPING = 0.3, 0.02, 0.3


def tables(sharding: str) -> list[Table]:
    return [Table(name, *size, init_scale=0.3, sharding=sharding) for name, size in SIZES.items()]  # type: ignore[arg-type]


class SmallRanker(nn.Module):
    """Network over the user and the pooled entries of each history."""

    def __init__(self) -> None:
        super().__init__()
        attention = SequenceAttention(
            4, (4, 8), [LONGEST] * len(HISTORIES), heads=2, head_dim=3, alike=((0, 0), (1, 2))
        )
        self.attention = attention
        self.linear = nn.Linear(1 + 4 + len(HISTORIES) * attention.out_features, 2)

    def forward(self, embedded: dict[str, Tensor], lengths: dict[str, Tensor], dense: Tensor) -> Tensor:
        sequences = [(embedded[f"{name}_item"], embedded[f"{name}_context"].view(-1, 8)) for name in HISTORIES]
        of_row = [lengths[f"{name}_item"] for name in HISTORIES]
        found = self.attention(embedded["user"], sequences, of_row)
        return self.linear(torch.cat([dense, embedded["user"], found], 1))


def make_ranker() -> SmallRanker:
    torch.manual_seed(SEED)
    return SmallRanker()


@dataclass(frozen=True)
class Rows:
    """Rows of a step: lookup name -> the ids of each row, and the rest of a batch."""

    ids: dict[str, list[Tensor]]
    dense: Tensor
    label: Tensor
    user_id: Tensor

    def batch(self, start: int, stop: int) -> RankingBatch:
        flat = [ids for name in KEYS for ids in self.ids[name][start:stop]]
        keyed = KeyedJaggedTensor(
            keys=list(KEYS),
            values=torch.cat([*flat, torch.empty(0, dtype=torch.int64)]),
            lengths=torch.tensor([len(ids) for ids in flat], dtype=torch.int64),
            stride=stop - start,
            length_per_key=[sum(len(ids) for ids in self.ids[name][start:stop]) for name in KEYS],
        )
        label = self.label[start:stop]
        user = self.user_id[start:stop]
        return RankingBatch(
            [keyed], self.dense[start:stop], label, torch.ones_like(label), user, user, user, stop - start
        )


def steps() -> list[Rows]:
    """Steps of unequal size, users with several rows, and many empty histories; one step has no row to align."""
    found = []
    for step in range(STEPS):
        random = torch.Generator().manual_seed(step)
        rows = 2 * MOST - 3 * step

        def ids(high: int, lengths: list[int], random: torch.Generator = random) -> list[Tensor]:
            return [torch.randint(0, high, (n,), generator=random) for n in lengths]

        user = torch.randint(0, 12, (rows,), generator=random)
        of_row = {"user": [value[None] for value in user]}
        for name in HISTORIES:
            lengths = torch.randint(0, LONGEST + 1, (rows,), generator=random) * (name != "mixed" or step != 2)
            of_row[f"{name}_item"] = ids(15, lengths.tolist())
            of_row[f"{name}_context"] = ids(6, (2 * lengths).tolist())
        dense, label = torch.randn(rows, 1, generator=random), torch.rand(rows, 2, generator=random)
        found.append(Rows(of_row, dense, (label < 0.4).float(), user))
    return found


def batches_of(rank: int, world: int) -> Iterator[RankingBatch]:
    """Yield a rank's batches; the second of two ranks has fewer rows, then none, and runs out before the first."""
    for step, rows in enumerate(steps()):
        n = len(rows.dense)
        cut = n if world == 1 else n - min(n // 3, max(0, 4 - step))
        if rank == 0:
            yield rows.batch(0, cut)
        elif step < STEPS - 1:
            yield rows.batch(cut, n)


class PlainTraining:
    """Training in one process with plain PyTorch: SGD for tables, AdamW for the network, clipping like the engine."""

    def __init__(self, clipping: float, alignment: Alignment | None = ALIGNMENT) -> None:
        self.ranker, self.clipping, self.alignment = make_ranker(), clipping, alignment
        self.tables = {
            table.name: initial_rows(table, SEED, 0, table.rows).requires_grad_() for table in tables("auto")
        }
        self.adam = torch.optim.AdamW(self.ranker.parameters(), DENSE_RATE, weight_decay=0.0)

    def step(self, rows: Rows) -> tuple[float, float]:
        """Return the losses of the behaviours and of the alignment, means over rows."""
        n = len(rows.dense)
        found = {lookup.name: [self.tables[lookup.table][ids] for ids in rows.ids[lookup.name]] for lookup in LOOKUPS}
        embedded = {name: torch.cat(parts) for name, parts in found.items()}
        lengths = {name: torch.tensor([len(part) for part in parts]) for name, parts in found.items()}
        logits = self.ranker(embedded, lengths, rows.dense)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, rows.label, reduction="sum") / n
        aligned = torch.zeros(())
        if self.alignment is not None:
            entries = [
                [
                    torch.cat([item, context.view(-1, 8)], 1)
                    for item, context in zip(found[f"{name}_item"], found[f"{name}_context"], strict=True)
                ]
                for name in HISTORIES
            ]
            settings = self.alignment
            aligned = alignment_loss(
                entries,
                rows.user_id.tolist(),
                settings.temperature,
                symmetric=settings.symmetric,
                detached=settings.detached,
            ).sum()
            aligned = aligned / n
        self.adam.zero_grad()
        for table in self.tables.values():
            table.grad = None
        weight = self.alignment.weight if self.alignment is not None else 0.0
        (losses + weight * aligned).backward()
        factor = 1.0
        if self.clipping:
            norm = float(nn.utils.clip_grad_norm_(self.ranker.parameters(), self.clipping))
            factor = min(1.0, self.clipping / (norm + 1e-6))
        self.adam.step()
        with torch.no_grad():
            for table in self.tables.values():
                assert table.grad is not None
                table -= TABLE_RATE * factor * table.grad
        return float(losses.detach()), float(aligned.detach())

    def parameters(self) -> dict[str, Tensor]:
        named = self.tables | dict(self.ranker.named_parameters())
        return {name: parameter.detach() for name, parameter in named.items()}


@dataclass(frozen=True)
class Way:
    """Variant of training that must agree with :class:`PlainTraining`."""

    sharding: str = "row_wise"
    stage: int = 1
    parts: int = 1
    clipping: float = 0.0
    alignment: Alignment | None = ALIGNMENT


WAYS = {
    "row_wise": Way(),
    "table_wise": Way("table_wise", 0),
    "accumulated": Way(parts=3),
    "accumulated, clipped, ZeRO 2": Way("table_wise", 2, parts=3, clipping=CLIPPING),
    "one way": Way(alignment=replace(ALIGNMENT, symmetric=False)),
    "anchor detached": Way(alignment=replace(ALIGNMENT, detached="anchor"), parts=2),
    "not aligned": Way(alignment=None),
}
