"""Ranks of test_init_from.py, started once for all its tests.

    torchrun --nproc-per-node N -m tests.distributed.init_ranks OUT DATASET

starts new models in every layout from the runs OUT/SEED-OPTIMIZER, and writes their content to OUT/<ranks>.pt.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.distributed.engine_ranks import everything
from tests.distributed.old_run import DIMS, config_of, features_of, vocabularies
from trainer.checkpoint.reader import StoredPiece
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.ranking.setup import build_engine
from trainer.ranking.warm_start import format_taken, warm_start
from trainer.runtime.distributed import World


@dataclass(frozen=True)
class Start:
    """Settings of the start of a new model; ``layout`` is the sharding of all tables, or ``mixed``."""

    seed: int
    then: str
    now: str
    layout: str
    stage: int = 0
    dense: bool = False
    tables: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.seed} {self.then} {self.now} {self.layout} {self.stage} {self.dense} {','.join(self.tables)}"

    @property
    def changes(self) -> dict[str, Any]:
        layouts = dict.fromkeys(DIMS, self.layout)
        if self.layout == "mixed":
            layouts = {"user": "row_wise", "author": "table_wise", "item": "table_wise", "side": "row_wise"}
        return {
            **{f"features.{name}.sharding": layout for name, layout in layouts.items()},
            "tables.optimizer": self.now,
            "init_from.run": f"{self.seed}-{self.then}",
            "init_from.tables": self.tables,
            "init_from.dense": self.dense,
            "features.exclude": self.exclude,
            "run.seed": 100 + self.seed,
        }


ROWWISE, ADAGRAD = "rowwise_adagrad", "adagrad"
STARTS = (
    Start(0, ROWWISE, ROWWISE, "table_wise", dense=True),
    Start(0, ROWWISE, ROWWISE, "row_wise", 1, dense=True),
    Start(1, ROWWISE, ROWWISE, "mixed", exclude=("device",)),
    Start(1, ROWWISE, ADAGRAD, "row_wise", tables=("user",)),
    Start(2, ADAGRAD, ADAGRAD, "column_wise", tables=("side", "author")),
    Start(2, ADAGRAD, "sgd", "table_wise", 2, dense=True),
)

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "another dimension": ({"features.item.dim": 8}, "table 'item' had dim = 16 and has 8 now"),
    "another size": ({"features.item.rows": 91}, "hashed ids have other rows in a table of another size"),
    "another mapping": ({"features.author": {"ids": "hash", "rows": 57, "dim": 8}}, "were mapped by 'direct'"),
    "no such table": ({"init_from.tables": ["rooms"]}, "has no table 'rooms'; it has author, item, side, user"),
    "no such run": ({"init_from.run": "nowhere"}, "nowhere: no checkpoint and no run"),
    "another kind": ({"model.kind": "mmoe", "init_from.dense": True}, "model.kind shared_bottom, this one mmoe"),
    "another width": ({"model.tower": [5], "init_from.dense": True}, "the old network is another one: "),
    "other inputs": ({"features.exclude": ["stat:*"], "init_from.dense": True}, "features.exclude [], this one"),
    "other outputs": ({"data.behaviours": ["gift", "click"], "init_from.dense": True}, "behaviours ['click',"),
    "a smaller table": ({"features.author.rows": 39}, "table 'author': it had 40 rows and has 39 now"),
    "damaged": ({"init_from.run": "damaged"}, "is damaged (model/__1_0.distcp has another content"),
}
"""Mistake -> changes to the first start, and a part of the message about them."""


def begin(start: Start, changes: dict[str, Any], world: World, out: Path, spec: DatasetSpec) -> tuple[Any, ...]:
    """Start a new model, and return its engine and the summary of the warm start."""
    settings = {**start.changes, "train.deepspeed": str(out / f"zero{start.stage}.json"), **changes}
    settings["init_from.run"] = str(out / settings["init_from.run"])
    config = config_of(settings)
    features = features_of(spec, config, vocabularies(start.seed)[1])
    engine = build_engine(config, features, config.model.kind, world)
    try:
        return engine, warm_start(engine, config, config.model.kind, features, world)
    except UserError:
        engine.close()
        raise


def main(out: Path, dataset: str) -> None:
    spec = DatasetSpec.load(dataset)
    read: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    plain_read = StoredPiece.read

    def counted_read(piece: StoredPiece) -> Any:
        values = plain_read(piece)
        read.append((str(piece.file), piece.offsets, piece.sizes))
        return values

    StoredPiece.read = counted_read  # type: ignore[method-assign]
    for stage in (0, 1, 2):
        (out / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    with World.join("cpu") as world:
        outcome: dict[str, Any] = {"taken": {}, "mistakes": {}}
        for start in STARTS:
            read.clear()
            engine, report = begin(start, {}, world, out, spec)
            outcome["taken"][str(start)] = {
                "tensors": everything(engine, world),
                "working": {name: p.detach().clone() for name, p in engine._dense.module.named_parameters()},
                "report": report,
                "text": format_taken(report),
                "pieces": world.agree(world.gather(list(read))),
                "plan": engine.plan,
            }
            engine.close()
        for name, (changes, _) in MISTAKES.items() if world.size > 1 else ():
            message = ""
            try:
                begin(STARTS[0], changes, world, out, spec)
            except UserError as error:
                message = str(error)
            outcome["mistakes"][name] = world.agree(world.gather(message))
        if world.rank == 0:
            torch.save(outcome, out / f"{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
