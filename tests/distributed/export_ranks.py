"""Ranks of test_export.py, started once for all its tests.

    torchrun --nproc-per-node 2 -m tests.distributed.export_ranks OUT DATASET CANDIDATES

trains every kind of network in float32, and one in bfloat16, and scores the candidates with each checkpoint.
OUT/float32 and OUT/bfloat16 are runs, OUT/PRECISION-KIND.parquet are scores.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq

from trainer.checkpoint.manifest import MODEL, find_checkpoint
from trainer.checkpoint.run_directory import model_dirs
from trainer.config.ranker import NetworkName, load_config
from trainer.rank import run_job
from trainer.ranking.setup import build_engine
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.serving.scoring import read_candidates, score_candidates
from trainer.serving.trained_run import open_run

SETTINGS = (
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "features.history.short.length=5",
    "features.history.live.length=5",
    "features.user.sharding=row_wise",
    "features.item.sharding=table_wise",
    "features.side.dim=8",
    "features.item.ids=dynamic",
    "features.item.rows=70",
    "train.batch_size=96",
    "train.log_every=50",
    # Large learning rates: after a few steps the candidates must have different scores.
    "optimizer.learning_rate=0.02",
    "tables.learning_rate=0.3",
    "train.device=cpu",
    "data.eval_from=",
)
KINDS = get_args(NetworkName)
RUNS = {"float32": KINDS, "bfloat16": KINDS[:1]}


def main(out: Path, dataset: str, candidates: Path) -> None:
    (out / "bfloat16.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}))
    (out / "float32.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with World.join("cpu") as world:
        for precision, kinds in RUNS.items():
            overrides = (
                f"data.path={dataset}",
                f"run.directory={out / precision}",
                f"train.deepspeed={out / precision}.json",
                f"train.baselines={json.dumps(kinds[1:])}",
            )
            config = load_config("configs/simulated.toml", (*SETTINGS, *overrides))
            run_job(config, world, Preemption())
            run = open_run(str(out / precision), world)
            run.engine.close()
            for kind, model_dir in model_dirs(out / precision, config).items():
                engine = build_engine(run.config, run.features, kind, world)
                engine.load(find_checkpoint(model_dir) / MODEL)
                # All ranks score all candidates: scoring is collective.
                rows = read_candidates(candidates, run.data.spec)
                scores = score_candidates(replace(run, engine=engine), dataset, rows)
                if world.rank == 0:
                    pq.write_table(scores, out / f"{precision}-{kind}.parquet")
                engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
