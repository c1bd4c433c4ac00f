"""Ranks of test_content.py: models with pre-trained vectors and codes, trained on all rows of a step or on some.

    torchrun --nproc-per-node N -m tests.distributed.content_ranks OUT DATASET TABLES

The results are written to OUT/N.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modules.ranker import Ranker
from tests.distributed.engine_ranks import parameters
from trainer.config.ranker import JobConfig, parse_config
from trainer.data.features.code_inputs import open_codes
from trainer.data.features.content_inputs import open_reader
from trainer.data.features.content_tables import open_tables
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import fit_features
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import Rows
from trainer.data.format.shards import read_rows
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch import RankingBatch, unpack
from trainer.engine.build_ranker import build_ranker
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.ranking.evaluation import sum_missing
from trainer.runtime.distributed import World

STEPS, ROWS = 5, 24
TABLE_RATE, DENSE_RATE = 0.5, 0.01
WAYS: dict[str, tuple[dict[str, Any], int, int]] = {
    "ple with din": ({"kind": "ple"}, 0, 1),
    "cgc with twin, in micro-batches": ({"kind": "cgc", "attention_kind": "twin"}, 1, 3),
    "mmoe with multi_head": ({"kind": "mmoe", "attention_kind": "multi_head"}, 2, 1),
    "shared_bottom in micro-batches": ({"kind": "shared_bottom"}, 0, 2),
    "dcn": ({"kind": "dcn"}, 0, 1),
    "logistic": ({"kind": "logistic"}, 0, 1),
}
"""Name -> settings of the model, ZeRO stage, and number of micro-batches."""


def job(dataset: Path, tables: Path, model: dict[str, Any]) -> JobConfig:
    return parse_config(
        {
            "data": {"path": str(dataset)},
            "model": {"expert_layers": [[12], [8]], "tower": [6], "heads": 2, "head_dim": 4, **model},
            "features": {
                "history": {"short": {"domain": "video", "length": 4}, "both": {"domain": "both", "length": 5}},
                # Few rows of prefixes, so that the largest table is hashed.
                "codes": {"shown": {"file": str(tables.parent / "codes.parquet"), "dim": 4, "prefix_rows": 20}},
                "content": {
                    "title": {"table": str(tables / "items"), "dim": 5, "histories": True},
                    "person": {"table": str(tables / "authors"), "of": "author", "dim": 3},
                    "air": {
                        **{"table": str(tables / "segments"), "of": "segment", "dim": 4},
                        **{"histories": True, "reading": "mean", "on_air": "longest"},
                    },
                },
            },
        },
        "test",
    )


class Setting:
    """Features of a job, and the rows of its steps."""

    def __init__(self, config: JobConfig) -> None:
        self.config, self.data = config, Dataset.open(config.data.path)
        tables = open_tables(config.features)
        fitted = fit_features(
            self.data.spec, self.data.store, self.data.histories, config.features, Selection(), tables
        )
        reader = open_reader(config.features, config.data.path, fitted.content, tables)
        codes = open_codes(config.features, fitted.codes)
        self.features = FeatureMap(self.data.spec, config.features, fitted, (), codes, reader)
        self.rows = read_rows(config.data.path, self.data.spec)

    def part(self, rows: np.ndarray) -> RankingBatch:
        chosen: Rows = {name: column[rows] for name, column in self.rows.items()}
        packed = self.features.pack(chosen, self.data.histories, chosen["request_ms"])
        return unpack(packed, self.features.layout, {0: [0, 0, len(rows)]})

    def steps(self) -> Iterator[np.ndarray]:
        """Yield the rows of each step; the last step has few, so that a rank may have none."""
        last = len(self.rows["user_id"])
        for step in range(STEPS):
            rows = np.arange(last - (step + 1) * ROWS, last - step * ROWS)
            yield rows if step < STEPS - 1 else rows[:1]

    def batches(self, rank: int, size: int) -> Iterator[RankingBatch]:
        for rows in self.steps():
            yield self.part(rows[rank::size])

    def ranker(self) -> Ranker:
        return build_ranker(self.config, self.features, self.config.model.kind)


def train(setting: Setting, stage: int, parts: int, world: World) -> dict[str, Any]:
    """Train a model, and predict the rows of the first step with it."""
    features = setting.features
    engine = HybridEngine(
        features.tables,
        features.lookups,
        setting.ranker(),
        table_optimizer=TableOptimizer("sgd", TABLE_RATE),
        dense_optimizer=DenseOptimizer(DENSE_RATE),
        deepspeed={"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": parts},
        loss=BehaviourLoss(torch.ones(len(features.behaviours))),
        batch_size=6 * ROWS,
        device=world.device,
        seed=1,
        content=features.layout.content,
    )
    losses = [float(result.loss) for result in engine.steps(setting.batches(world.rank, world.size))]
    found = {"losses": losses, "parameters": parameters(engine, world)}
    # A rank without any row takes part with empty batches.
    first = setting.part(next(setting.steps()))
    own = iter([first] if world.rank == 0 else [])
    found["logits"] = torch.cat([logits for _, logits in engine.predict(own)] or [torch.empty(0)])
    found["attention"] = [weights for _, weights in engine.attention(iter([first] if world.rank == 0 else []))][:1]
    own_rows = setting.part(next(setting.steps())[world.rank :: world.size])
    found["missing"] = sum_missing(MissingTally(own_rows.missing), engine.control).counts
    engine.close()
    return found


def main(out: Path, dataset: Path, tables: Path) -> None:
    with World.join("cpu") as world:
        found = {
            name: train(Setting(job(dataset, tables, model)), stage, parts, world)
            for name, (model, stage, parts) in WAYS.items()
        }
        if world.rank == 0:
            torch.save(found, out / f"{world.size}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
