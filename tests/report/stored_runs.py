"""Small runs on disk, as a ranker's job would have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.ranker import parse_config
from trainer.metrics.behaviour_metrics import auc, grouped_auc
from trainer.ranking.held_out_rows import HELD_OUT, TIME_ZONE, USER_HASHES, USERS_BELOW
from trainer.runtime.phase_timer import PHASES

BEHAVIOURS = ("click", "gift")
ROWS = 1200
HOUR = 3_600_000


def held_out_rows(noise: float, seed: int = 0, behaviours: tuple[str, ...] = BEHAVIOURS) -> dict[str, np.ndarray]:
    """Return rows with labels by ``seed``, and predictions that are the worse, the more noise they have."""
    random = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {
        "user_id": random.integers(0, 40, ROWS),
        "visit_id": np.arange(ROWS) * 3,
        "request_ms": np.arange(ROWS) * HOUR // 24,
        "earlier_user": random.integers(0, 300, ROWS).astype(np.float32),
        "earlier_author": random.integers(0, 30, ROWS).astype(np.float32),
    }
    errors = np.random.default_rng(round(1000 * noise))
    for name in behaviours:
        truth = random.random(ROWS) * (0.8 if name == "click" else 0.1)
        columns[f"truth_{name}"] = truth.astype(np.float32)
        columns[f"label_{name}"] = (random.random(ROWS) < truth).astype(np.uint8)
        columns[f"mask_{name}"] = np.ones(ROWS, np.uint8)
        columns[f"p_{name}"] = np.clip(truth + noise * errors.standard_normal(ROWS), 0.001, 0.999).astype(np.float32)
    return columns


def write_rows(directory: Path, columns: dict[str, np.ndarray]) -> None:
    """Write ``held_out.parquet``."""
    notes = {TIME_ZONE: b"Asia/Shanghai", USERS_BELOW: str(USER_HASHES).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(notes), directory / HELD_OUT)


def write_model(directory: Path, kind: str, noise: float, behaviours: tuple[str, ...] = BEHAVIOURS) -> None:
    """Write the files of a model: rows, metrics, plan, and a checkpoint with its history."""
    columns = held_out_rows(noise, behaviours=behaviours)
    (directory / "checkpoints" / "step-00000020").mkdir(parents=True)
    write_rows(directory, columns)
    metrics = {}
    for name in behaviours:
        scores, labels = columns[f"p_{name}"], columns[f"label_{name}"]
        metrics[name] = {
            "auc": auc(scores, labels),
            "gauc": grouped_auc(columns["user_id"], scores, labels),
            "uauc": 0.5,
            "logloss": 0.5,
            "ne": 0.9,
            "calibration": 1.01 if name == "click" else 1.5,
            "positives": int(labels.sum()),
            "rows": ROWS,
            "best_auc": auc(columns[f"truth_{name}"], labels),
        }
    document = {
        "behaviours": metrics,
        "model": kind,
        "training": {
            "rows": 2000,
            "skipped_rows": 50,
            "rows_per_second": 100.0,
            "share_of_time": dict(zip(PHASES, (0.4, 0.2, 0.3, 0.1), strict=True)),
            "checkpoint_stalls_seconds": [0.5, 4.0],
        },
        "calibration_curves": {name: [[0.1, 0.12, 200], [0.5, 0.4, 190], [0.9, 0.0, 10]] for name in behaviours},
    }
    (directory / "metrics.json").write_text(json.dumps(document))
    plan = {"table": "user", "rows": 1000, "dim": 16, "sharding": "row_wise", "kernel": "fused", "ranks": [0, 1]}
    (directory / "plan.json").write_text(json.dumps([plan]))
    trace = [
        {
            "step": step,
            "loss": 1 / step,
            "rows": 500,
            "rows_per_second": 100.0,
            "auc": {name: 0.5 + step / 100 for name in behaviours},
            "ids": {"item": {"looked_up": 100, "unserved": 80}},
            **dict.fromkeys(PHASES, 1.0),
        }
        for step in (5, 10, 15, 20)
    ]
    (directory / "checkpoints" / "step-00000020" / "job.json").write_text(json.dumps({"trace": trace}))


def write_ranker(
    directory: Path, noise: float = 0.1, *, name: str = "small", behaviours: tuple[str, ...] = BEHAVIOURS, **model: Any
) -> Path:
    """Write a finished run with the baseline ``logistic``."""
    settings = {
        "run": {"name": name},
        "data": {"path": "data/small"},
        "train": {"baselines": ["logistic"]},
        "model": {"kind": "mmoe", **model},
    }
    write_model(directory, "mmoe", noise, behaviours)
    write_model(directory / "baselines" / "logistic", "logistic", 0.3, behaviours)
    config = parse_config(settings, "test").model_dump(mode="json")
    (directory / "config.json").write_text(json.dumps(config))
    start = {"started": "2026-11-30T04:06:38+0000", "ranks": 2, "host": "here", "packages": {"torch": "2"}}
    start |= {"command": ["rank.py", f"run.name={name}"], "dataset": {"path": "data/small", "fingerprint": "abc"}}
    (directory / "environment.json").write_text(json.dumps({"starts": [start]}))
    return directory
