"""Small runs on disk, as their jobs would have written them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.ranker import parse_config
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.metrics.behaviour_metrics import auc, grouped_auc
from trainer.ranking.attention_examples import ATTENTION_EXAMPLES
from trainer.ranking.held_out_rows import HELD_OUT, TIME_ZONE, USER_HASHES, USERS_BELOW
from trainer.runtime.phase_timer import PHASES
from trainer.runtime.run_status import recorded_status

BEHAVIOURS = ("click", "gift")
ROWS = 1200
HOUR = 3_600_000


def held_out_rows(noise: float, seed: int = 0, behaviours: tuple[str, ...] = BEHAVIOURS) -> dict[str, np.ndarray]:
    """Return rows with labels by ``seed``, and predictions that are the worse, the more noise they have."""
    random = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {
        "user_id": random.integers(0, 40, ROWS),
        "visit_id": np.arange(ROWS) * 3,
        "item_id": np.arange(ROWS) // 200,
        "author_id": np.arange(ROWS) // 400,
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
    (directory / ATTENTION_EXAMPLES).write_text(json.dumps(attention_examples()))
    config = parse_config(settings, "test").model_dump(mode="json")
    (directory / "config.json").write_text(json.dumps(config))
    start = {"started": "2026-11-30T04:06:38+0000", "ranks": 2, "host": "here", "packages": {"torch": "2"}}
    start |= {"command": ["rank.py", f"run.name={name}"], "dataset": {"path": "data/small", "fingerprint": "abc"}}
    (directory / "environment.json").write_text(json.dumps({"starts": [start]}))
    return directory


def attention_examples() -> dict[str, Any]:
    """Return the attention of two rows: of a user who meets an author again, and of one without a preference."""

    def visit(share: float, author: int, hours: int, *did: str, **more: Any) -> dict[str, Any]:
        ids = {"domain": "live", "item_id": 10 * author, "author_id": author, "request_ms": (100 - hours) * HOUR}
        return {"attention": share, **ids, "behaviours": list(did), "as_the_candidate": [], **more}

    met = {
        **{"user_id": 12, "visit_id": 5, "item_id": 79, "author_id": 7, "at_ms": 100 * HOUR, "did": ["click"]},
        **{"earlier_visits_of_author": 2, "probabilities": {"click": 0.62, "gift": 0.013}},
        "histories": {
            "live": {
                "found": 20,
                "entries": [
                    visit(0.41, 7, 48, "click", "gift", as_the_candidate=["author_category"]),
                    visit(0.08, 9, 3),
                ],
            },
            "short": {"found": 2, "entries": [visit(0.51, 3, 1), visit(0.49, 4, 2)]},
            "author": {"found": 0, "entries": []},
        },
    }
    even = {
        **{"user_id": 13, "visit_id": 6, "item_id": 79, "author_id": 7, "at_ms": 100 * HOUR, "did": []},
        **{"earlier_visits_of_author": 10, "probabilities": {"click": 0.05}},
        "histories": {"live": {"found": 1, "entries": [visit(1.0, 7, 99)]}},
    }
    return {"timezone": "UTC", "examples": [met, even]}


def write_job(directory: Path, config: dict[str, Any], metrics: dict[str, Any], trace: list[dict[str, Any]]) -> Path:
    """Write a finished run of any kind: settings, metrics, and a checkpoint with its history."""
    (directory / "checkpoints" / "step-00000020").mkdir(parents=True)
    (directory / "lock").touch()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.json").write_text(json.dumps(metrics))
    (directory / "checkpoints" / "step-00000020" / "job.json").write_text(json.dumps({"trace": trace}))
    return directory


def _choices(accuracy: float, loss: float) -> dict[str, float]:
    return {"accuracy": accuracy, "log_loss": loss, "auc": accuracy}


def write_finetune(directory: Path) -> Path:
    """Write a fine-tuning run that beats its baselines in one of two tasks."""
    names = ("model", "untuned", "majority")
    task = {name: _choices(value, 1 - value) for name, value in zip(names, (0.8, 0.3, 0.4), strict=True)}
    metrics = {
        "tasks": {"fire": 900, "a_task_with_a_long_name": 100},
        "evaluation": {
            "fire": {"samples": 200, **task, "popularity": None},
            "a_task_with_a_long_name": {"samples": 20, **task | {"model": _choices(0.45, 0.7)}, "popularity": None},
        },
        "engine": {"class": "DeepSpeedEngine", "optimizer": "x", "zero_stage": 2},
        "parameters": {"trainable": 1000, "all": 50_000},
        "samples": {"trained_on": 1000, "tokens": 9000, "answer_tokens": 800, "truncated": 100, "left_out": 0},
        "training": {"steps": 20, "loss": [2.0, 1.0], "tokens_per_second": 512.0, "padding_share": 0.1},
    }
    trace = [
        {"step": step, "loss": 2 / step, "learning_rate": 1e-3, "tokens": 99, "seconds": 1.0, "tokens_per_second": 99.0}
        for step in (10, 20)
    ]
    return write_job(directory, {"lora": {}, "train": {"log_every": 10}}, metrics, trace)


def write_foresight(directory: Path) -> Path:
    """Write a run of a predictor that a rule beats."""
    quality = {"model": {"top_1": 0.2, "top_10": 0.7, "nll": 3.0}, "last": {"top_1": 0.1, "top_10": 0.3, "nll": 2.5}}
    metrics = {
        **{"codebook": "256-abc", "codes": 256, "target": "next"},
        "rows": {
            **{"training": 1000, "held_out": 100, "segments_without_author": 7},
            "short_contexts": {"training": 10, "held_out": 1},
        },
        "training": {"steps": 20, "loss": [3.5, 3.0], "rows_per_second": 900.0},
        "evaluation": {
            "rows": {"all": 100, "unseen authors": 25},
            "quality": {"all": quality, "unseen authors": quality},
            "reference": {"accuracy": 0.31},
        },
    }
    trace = [{"step": step, "loss": 3.0, "learning_rate": 1e-3, "rows": 50, "seconds": 1.0} for step in (10, 20)]
    return write_job(directory, {"evaluate": {}}, metrics, trace)


def write_foresight_follow(directory: Path) -> Path:
    """Write a run of a predictor that has followed segments, too slowly."""
    quality = {"model": {"top_1": 0.2, "nll": 3.0}, "last": {"top_1": 0.1, "nll": 5.0}}
    records = [{"step": step, "rows": 50, **quality} for step in (10, 20)]
    metrics = {
        "codebook": "256-abc",
        "segments": {"forecast": 500, "earlier": 20, "later": 0, "without_author": 3, "short_contexts": 9},
        "training": {"steps": 20, "loss": [3.0, 3.0], "rows_per_second": 9.0, "slow_ticks": 4},
        "progressive": {"rows": 100, "quality": quality, "records": records},
    }
    trace = [
        {"step": step, "loss": 3.0, "learning_rate": 1e-3, "rows": 50, "seconds": 1.0, "progressive": quality}
        for step in (10, 20)
    ]
    return write_job(directory, {"evaluate": {}}, metrics, trace)


def write_staytime(directory: Path) -> Path:
    """Write a staytime run with predictions that are twice too large."""
    random = np.random.default_rng(0)
    seconds = random.exponential(10, ROWS) * (random.random(ROWS) < 0.3)
    columns = {
        "user_id": random.integers(0, 40, ROWS),
        "seconds": seconds.astype(np.float32),
        "predicted": (2 * seconds + random.random(ROWS)).astype(np.float32),
    }
    values = {"rmse": 9.0, "mae": 4.0, "bias": 2.1, "xauc": 0.6, "gauc": 0.7, "rows": ROWS, "opened": 300}
    metrics = {
        "all": values,
        "exposures": {"0": values, "1-5": values, "more": dict.fromkeys(values)},
        "constant": {"zero": {"rmse": 8.0, "mae": 3.0, "bias": 0.0}},
        "truth": values | {"rmse": 5.0},
        "comments": {"popular": {"auc": 0.6, "rows": 9}, "touched": {"auc": None, "rows": 0}, "share_touched": 0.9},
        "losses": [{"loss": 3.0, "staytime": 2.0}, {"loss": 2.0, "staytime": 1.5}],
        **{"train_seconds": 3.5, "parameters": 4321},
    }
    config = {"lcu": {"enabled": True, "mode": "corrected"}, "base": {"loss": "d2q", "backbone": "dcn"}}
    write_job(directory, config, metrics, [])
    pq.write_table(pa.table(columns), directory / "predictions.parquet")
    facts = {"duration_edges": [10.0, 20.0], "not_opened": [0.8, 0.7, 0.6], "limit": 99.0}
    fitted = {"base": facts, "fields": ["user_id", "item_id"], "training_visits": 777, "opened_in_training": 0.3}
    (directory / "fitted.json").write_text(json.dumps(fitted))
    return directory


def write_align(directory: Path) -> Path:
    """Write an alignment whose right author is among the first 3 of 10 in every pair."""
    n = 200
    group = {"pairs": n, "authors": 9, "recall@1": 1 / 3, "recall@3": 1.0, "mrr": 0.6, "on_air": 10.0, "gate": 0.4}
    metrics = {
        "positives": ["click"],
        "retrieval": {"all": group, "unseen": group | {"pairs": 5, "gate": 1.0}, "rarest quarter": group},
        "training": {"rows": 2000, "rows_per_second": 100.0, "share_of_time": dict.fromkeys(PHASES, 0.25)},
    }
    trace = [
        {"step": step, "loss": 3.0, "rows": 500, "rows_per_second": 100.0, "auc": {}, **dict.fromkeys(PHASES, 1.0)}
        for step in (10, 20)
    ]
    write_job(directory, {"towers": {}, "evaluate": {}}, metrics, trace)
    columns = {
        "user_id": np.arange(n) % 20,
        "larger": np.arange(n) % 3,
        "equal": np.ones(n, np.int64),
        "on_air": np.full(n, 10),
    }
    pq.write_table(pa.table(columns), directory / "held_out.parquet")
    return directory


def write_codebook(directory: Path) -> Path:
    """Write manifest and report of a codebook version with unused codes."""
    level = {
        **{"codes": 100, "distortion": 0.5, "of_variance": 0.25, "unused": 0.4, "perplexity": 30.0, "gini": 0.5},
        **{"top": 0.3, "curve": [0.0, 0.8, 1.0], "persistence": 0.6},
    }
    report = {
        **{"segments": 1000, "distinct_vectors": 900, "levels": [level, level | {"of_variance": 0.1, "unused": 0.0}]},
        "tuples": {"possible": 10_000, "used": 700, "alone": 0.8, "largest": 5, "persistence": 0.3},
        "refresh": {
            **{"from": "100x100-old", "segments": 50},
            "kept": {"warm, matched": {"levels": [0.9, 0.8], "tuple": 0.7}},
        },
    }
    manifest = {"name": "100x100-new", "levels": [100, 100], "dim": 8, "vectors": {"count": 5000}}
    directory.mkdir(parents=True)
    (directory / "codebook.json").write_text(json.dumps(manifest | {"matched_from": "100x100-old"}))
    (directory / "report.json").write_text(json.dumps(report))
    return directory


def write_embeddings(directory: Path) -> Path:
    """Write a table of vectors that are almost the same, of texts of which many were cut."""
    vectors = 1 + 0.01 * np.random.default_rng(0).standard_normal((600, 4)).astype(np.float32)
    counts = {"kept": 0, "embedded": 600, "refused": 0, "truncated": 90, "empty": 60}
    origin = Origin("qwen", "", {}, "mean", "f00d", counts)
    ContentVectors.write(directory / "items", np.arange(600), vectors, origin=origin)
    write_status(directory, "embed")
    return directory


def write_follow(directory: Path) -> Path:
    """Write the reports of a job that follows live rooms, the last one cut."""
    directory.mkdir(parents=True)
    entry = {
        **{"time_ms": 60_000, "needed_per_second": 1.0, "reached_per_second": None, "halved": True, "embedded": 10},
        **{"dropped": 3, "late": 0, "lag_seconds": {"p50": 1.0, "max": 2.0}},
    }
    lines = [json.dumps(entry | {"time_ms": 60_000 * minute}) for minute in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"cut']))
    write_status(directory, "embed --follow")
    return directory


def write_status(directory: Path, job: str) -> None:
    """Write the status of a job that has finished."""
    (directory / "lock").touch()
    with recorded_status(directory, job, 0, 1):
        pass


JOBS: dict[str, Callable[[Path], Path]] = {
    "align": write_align,
    "codebook": write_codebook,
    "embeddings": write_embeddings,
    "finetune": write_finetune,
    "follow": write_follow,
    "foresight": write_foresight,
    "foresight follow": write_foresight_follow,
    "staytime": write_staytime,
}
"""Kind of a run that is no ranker's -> writer."""
