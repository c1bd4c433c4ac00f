"""Rows of ``benchmarks/speed/throughput.py``: simulated with a truth to learn, written for Limelight and for its peers.

All systems read the same rows: Limelight from shards and histories (:func:`write_dataset`), its peers from arrays
(:func:`write_arrays`), since each has a file format of its own.

The labels depend on the dense values, hour, tag and city, and on the history: each user prefers one of ten topics,
which the popular authors have, and a candidate of that topic is liked better. So a model that ignores a part of the
input pays for it in AUC.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.loader import HOUR_MS, START_MS
from trainer.data.format.history import FOLDER, HistoryWriter
from trainer.data.format.schema import DatasetSpec, DenseFeature, IdSpace, Rows, SideFeature, partition_of
from trainer.data.format.shards import write_rows

ROWS, USERS, AUTHORS, ITEMS, DIM, LENGTH, DENSE = 131_072, 1_000_000, 100_000, 1_000_000, 16, 50, 8
BATCH = 2048
"""Rows of a step of all ranks."""

BEHAVIOURS = ("click", "like", "gift")
SIDE = (("hour", 24), ("tag", 1000), ("city", 500))
EXPERT_LAYERS = ((256, 128), (128, 64))
TASK_EXPERTS = SHARED_EXPERTS = 2
TOWER = (128, 64)
ATTENTION = (64, 16)
TABLE_RATE, DENSE_RATE = 0.01, 4e-3
"""Learning rates of Adagrad on the tables and of Adam on the dense network."""

TOPICS, POPULAR, POPULAR_SHARE, PREFERRED_SHARE = 10, 100, 0.4, 0.7
"""Topics; authors with one, the share of all visits that they have, and the share of the preferred one among them."""

BIAS = (-0.5, -1.0, -1.5)
HELD_OUT = 8
"""The held-out rows are the training rows divided by this number."""


@dataclass(frozen=True)
class WorkloadRows:
    """Rows with their histories, and the probabilities that their labels were drawn from.

    Attributes:
        ids: ``user``, ``author``, ``item``, ``hour``, ``tag``, ``city`` -> ``[rows]`` int64.
        dense: ``[rows, DENSE]`` float32.
        history_of: ``[rows]`` int64, row of the histories.
        users: ``[users]`` int64, owner of each history.
        past_author, past_item: ``[users, LENGTH]`` int64.
        label: ``[rows, behaviours]`` uint8.
        probability: ``[rows, behaviours]`` float64.
    """

    ids: dict[str, np.ndarray]
    dense: np.ndarray
    history_of: np.ndarray
    users: np.ndarray
    past_author: np.ndarray
    past_item: np.ndarray
    label: np.ndarray
    probability: np.ndarray


def make_rows(n: int, scale: int, seed: int) -> WorkloadRows:
    """Return ``n`` random rows, each of a user with 50 earlier visits; ids are fewer by the factor ``scale``."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    users, authors, items = (count // scale for count in (USERS, AUTHORS, ITEMS))
    effects = {name: world.normal(0, 0.5, (count, len(BEHAVIOURS))) for name, count in SIDE}
    linear = world.normal(0, 0.4, (DENSE, len(BEHAVIOURS)))
    crossed = world.normal(0, 0.4, (DENSE // 2, len(BEHAVIOURS)))

    def draw_authors(topic: np.ndarray, length: int) -> np.ndarray:
        shape = (len(topic), length)
        of_topic = topic[:, None] + TOPICS * rng.integers(0, POPULAR // TOPICS, shape)
        popular = np.where(rng.random(shape) < PREFERRED_SHARE, of_topic, rng.integers(0, POPULAR, shape))
        return np.where(rng.random(shape) < POPULAR_SHARE, popular, rng.integers(0, authors, shape)) % authors

    owners, history_of = np.unique(rng.integers(0, users, n), return_inverse=True)
    preferred = rng.integers(0, TOPICS, len(owners))
    author = draw_authors(rng.integers(0, TOPICS, n), 1)[:, 0]
    ids = {"user": owners[history_of], "author": author, "item": rng.integers(0, items, n)}
    ids |= {name: rng.integers(0, count, n) for name, count in SIDE}
    dense = rng.standard_normal((n, DENSE), np.float32)
    logit = np.asarray(BIAS) + dense @ linear + (dense[:, ::2] * dense[:, 1::2]) @ crossed
    logit += sum(effects[name][ids[name]] for name, _ in SIDE)
    logit += 2.0 * ((author < POPULAR) & (author % TOPICS == preferred[history_of]))[:, None]
    probability = 1 / (1 + np.exp(-logit))
    return WorkloadRows(
        ids=ids,
        dense=dense,
        history_of=history_of,
        users=owners,
        past_author=draw_authors(preferred, LENGTH),
        past_item=rng.integers(0, items, (len(owners), LENGTH)),
        label=(rng.random(probability.shape) < probability).astype(np.uint8),
        probability=probability,
    )


def write_dataset(path: Path, rows: WorkloadRows, scale: int) -> None:
    """Write rows and histories as a dataset of Limelight; ``visit_id`` is the number of the row."""
    n = len(rows.label)
    rng = np.random.default_rng(1)
    counts = {"user": USERS // scale, "author": AUTHORS // scale, "item": ITEMS // scale}
    spec = DatasetSpec(
        name="throughput",
        source="random numbers",
        licence="none",
        partitions=4,
        timezone="UTC",
        behaviours=BEHAVIOURS,
        applies={behaviour: ("video",) for behaviour in BEHAVIOURS},
        candidates=("video",),
        side=tuple(SideFeature(name, "context", count) for name, count in SIDE),
        dense=tuple(DenseFeature(f"dense_{k}", "context") for k in range(DENSE)),
        ids={name: IdSpace(count, count - 1) for name, count in counts.items()},
        span_ms=(START_MS, START_MS + HOUR_MS),
        rows=n,
    )
    request = np.sort(START_MS + rng.integers(0, HOUR_MS, n))
    columns: Rows = {
        "visit_id": np.arange(n),
        **{f"{name}_id": rows.ids[name] for name in counts},
        "domain": np.zeros(n, np.uint8),
        "kind": np.full(n, 4, np.uint8),
        "request_ms": request,
        "emit_ms": request,
        "side": np.stack([rows.ids[name] for name, _ in SIDE], axis=1).astype(np.int32),
        "dense": rows.dense,
        "stat": np.empty((n, 0), np.float32),
        "label": rows.label,
        "mask": np.ones((n, len(BEHAVIOURS)), np.uint8),
    }
    path.mkdir()
    write_rows(path, spec, columns)
    (path / FOLDER).mkdir()
    writer = HistoryWriter(path / FOLDER)
    partition = partition_of(rows.users, spec.partitions)
    for number in range(spec.partitions):
        of_partition = np.flatnonzero(partition == number)
        entries = len(of_partition) * LENGTH
        began = START_MS - rng.integers(HOUR_MS, 24 * HOUR_MS, entries)
        writer.append(
            {
                "user_id": np.repeat(rows.users[of_partition], LENGTH),
                "domain": np.zeros(entries, np.uint8),
                "item_id": rows.past_item[of_partition].reshape(-1),
                "author_id": rows.past_author[of_partition].reshape(-1),
                "request_ms": began,
                "play_ms": np.full(entries, 10_000),
                "bits": np.zeros(entries, np.int32),
                "known_ms": began,
            }
        )
    writer.close()
    (path / "dataset.json").write_text(spec.to_json())


def write_arrays(path: Path, parts: dict[str, WorkloadRows], batch: int, scale: int, warm_up: int) -> None:
    """Write rows for peers: ``PART.npz`` for each part, and ``workload.json`` with sizes, widths and rates."""
    for name, rows in parts.items():
        columns: dict[str, Any] = {
            **rows.ids,
            "dense": rows.dense,
            "past_author": rows.past_author[rows.history_of],
            "past_item": rows.past_item[rows.history_of],
            "label": rows.label.astype(np.float32),
        }
        np.savez(path / f"{name}.npz", **columns)
    facts: dict[str, Any] = {
        "tables": {"user": USERS // scale, "author": AUTHORS // scale, "item": ITEMS // scale, **dict(SIDE)},
        "histories": {"past_author": "author", "past_item": "item"},
        "behaviours": BEHAVIOURS,
        "dim": DIM,
        "length": LENGTH,
        "dense": DENSE,
        "task_experts": TASK_EXPERTS,
        "shared_experts": SHARED_EXPERTS,
        "expert_layers": EXPERT_LAYERS,
        "tower": TOWER,
        "attention": ATTENTION,
        "table_rate": TABLE_RATE,
        "dense_rate": DENSE_RATE,
        "batch": batch,
        "warm_up": warm_up,
    }
    (path / "workload.json").write_text(json.dumps(facts))
