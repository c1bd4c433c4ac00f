"""Small model with dynamic tables, and its plain training with a reference id map before every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from modules.embeddings import Dynamic, Table, initial_rows
from tests.distributed.small_model import (
    LOOKUPS,
    ROWS,
    SEED,
    PlainTraining,
    Rows,
    make_rows,
    share_of_first_rank,
    tables,
)
from tests.sparse.dynamic_reference import ReferenceIds
from trainer.data.loading.batch import RankingBatch
from trainer.sparse.dynamic_ids import BUCKET_ROWS

STEPS = 20
"""Enough for ids to be admitted, evicted, and replaced after they were trained."""

SIZES = {"item": 70, "room": 70}
"""Rows of each dynamic table: two buckets, one for each of two ranks."""

TABLE_OF = {lookup.name: lookup.table for lookup in LOOKUPS}


@dataclass(frozen=True)
class Case:
    """Settings of one variant of training; ``sharding`` is that of all tables.

    ``device`` trains with the operations of a GPU.
    """

    optimizer: Any
    sharding: str
    evict: Any
    admit_after: int = 2
    parts: int = 1
    clipping: float = 0.0
    overlap: bool = True
    device: bool = False

    def __str__(self) -> str:
        words = [self.optimizer, self.sharding, self.evict, f"after {self.admit_after}", f"{self.parts} parts"]
        words += ["device"] * self.device
        return ", ".join([*words, f"clipping {self.clipping}", f"overlap {self.overlap}"])


CASES = [
    Case("rowwise_adagrad", "row_wise", "recency", parts=3, clipping=0.5),
    Case("rowwise_adagrad", "table_wise", "both", admit_after=1),
    Case("adagrad", "row_wise", "frequency"),
    Case("sgd", "mixed", "recency", admit_after=3),
]
NO_OVERLAP = [replace(case, overlap=False) for case in CASES[::3]]
ON_DEVICE = [replace(case, device=True) for case in CASES[:2]]
ALL_CASES = [*CASES, *NO_OVERLAP, *ON_DEVICE]
CHECKPOINTED = [CASES[0], ON_DEVICE[1]]


def resharded(saved: Case) -> Case:
    """Return the other layout and form, to load a checkpoint into."""
    other = {"row_wise": "table_wise", "table_wise": "row_wise"}[saved.sharding]
    return replace(saved, sharding=other, device=not saved.device)


def dynamic_tables(case: Case) -> list[Table]:
    dynamic = Dynamic(case.admit_after, case.evict)
    return [
        replace(table, rows=SIZES[table.name], dynamic=dynamic) if table.name in SIZES else table
        for table in tables(case.sharding)
    ]


def passing_ids(rows: Rows, step: int) -> Rows:
    """Ids of dynamic tables from a moving window: each occurs for some steps, and a few occur in all."""
    random = torch.Generator().manual_seed(2000 + step)

    def draw(count: int) -> Tensor:
        passing = torch.randint(40, (count,), generator=random) + 10 * step
        staying = torch.randint(20, (count,), generator=random) - 2**62
        return torch.where(torch.rand(count, generator=random) < 0.2, staying, passing)

    moving = {key: [draw(len(each)) for each in ids] for key, ids in rows.ids.items() if TABLE_OF[key] in SIZES}
    return replace(rows, ids=rows.ids | moving)


@cache
def dynamic_steps() -> tuple[Rows, ...]:
    sizes = [ROWS if step % 5 in (2, 3) or step >= STEPS - 3 else ROWS + 1 for step in range(STEPS)]
    return tuple(passing_ids(make_rows(step, rows), step) for step, rows in enumerate(sizes))


def dynamic_batches(rank: int, world: int) -> Iterator[RankingBatch]:
    """Yield the batches of one of one or two ranks, like ``small_model.batches_of``."""
    for step, rows in enumerate(dynamic_steps()):
        cut = len(rows) if world == 1 else share_of_first_rank(step, len(rows), STEPS)
        if rank == 0 and world == 2 and step >= STEPS - 3:
            return
        yield rows.batch(0, cut) if rank == 0 else rows.batch(cut, len(rows))


class DynamicTraining(PlainTraining):
    """Plain training on the rows of a reference id map; row and optimizer state of a new id are reset."""

    def __init__(self, case: Case) -> None:
        declared = dynamic_tables(replace(case, sharding="auto"))
        super().__init__(case.optimizer, case.clipping, declared)
        self.declared = {table.name: table for table in declared}
        self.maps = {
            name: ReferenceIds(name, rows, case.admit_after, case.evict, BUCKET_ROWS) for name, rows in SIZES.items()
        }
        self.steps_done = self.renewed = 0

    def step(self, rows: Rows) -> float:
        self.steps_done += 1
        for name, ids in self.maps.items():
            keys = [key for key in rows.ids if TABLE_OF[key] == name]
            asked = [value for key in keys for each in rows.ids[key] for value in each.tolist()]
            self.start_afresh(name, sorted(ids.learn(asked, self.steps_done)))
        return super().step(self.mapped(rows))

    def mapped(self, rows: Rows) -> Rows:
        """Return the rows with table rows in place of ids; ids without a row get row 0."""
        ids = {
            key: [torch.tensor([max(0, self.maps[TABLE_OF[key]].find(int(v))) for v in each]).long() for each in of_key]
            for key, of_key in rows.ids.items()
            if TABLE_OF[key] in self.maps
        }
        return replace(rows, ids=rows.ids | ids)

    @torch.no_grad()
    def start_afresh(self, name: str, new: list[int]) -> None:
        fresh = initial_rows(self.declared[name], SEED, 0, SIZES[name])
        for parameter_name, parameter in self.tables.named_parameters():
            if parameter_name.split(".")[-2] == name:
                self.renewed += int((parameter[new] != fresh[new]).any(1).sum())
                parameter[new] = fresh[new]
                self.accumulated[parameter_name][new] = 0
