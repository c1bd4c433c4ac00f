"""Ranks of test_metrics_distributed.py: the metrics of rows that are divided among the ranks.

    torchrun --nproc-per-node N -m tests.distributed.metrics_ranks LAYOUT OUT

Each rank writes its reports to OUT/<rank>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer.data.format.schema import partition_of
from trainer.metrics.behaviour_metrics import BehaviourMetrics, ProgressiveMetrics
from trainer.runtime.distributed import World

BEHAVIOURS = ("common", "rare", "tied", "single_class")
SEEDS = 3


def world_rows(seed: int) -> tuple[np.ndarray, ...]:
    """Return users, probabilities, labels and mask of rows."""
    generator = np.random.default_rng(seed)
    rows = 5000
    user_id = generator.integers(0, 400, rows)
    probability = generator.beta(1, 4, (rows, len(BEHAVIOURS))).astype(np.float32)
    probability[:, 2] = np.round(probability[:, 2] * 4) / 4
    label = generator.random(probability.shape) < probability * np.array([1, 0.02, 1, 0])
    return user_id, probability, label, generator.random(probability.shape) < 0.7


def owner(user_id: np.ndarray, layout: str, world: int) -> np.ndarray:
    """Return the rank of each row: users are spread over all ranks, or the last rank has all of them."""
    return partition_of(user_id, world) if layout == "spread" else np.full(len(user_id), world - 1)


def all_metrics() -> Iterator[BehaviourMetrics | ProgressiveMetrics]:
    """Yield new metrics of each kind."""
    yield BehaviourMetrics(BEHAVIOURS)
    yield ProgressiveMetrics(BEHAVIOURS)
    # The sample is smaller than the data, so the ranks have to agree on one sample of users.
    yield ProgressiveMetrics(BEHAVIOURS, sampled_rows=1500)


def main(layout: str, out: Path) -> None:
    with World.join("cpu") as world:
        reports = []
        for seed in range(SEEDS):
            rows = world_rows(seed)
            own_rows = owner(rows[0], layout, world.size) == world.rank
            for metrics in all_metrics():
                metrics.update(*(torch.from_numpy(column[own_rows]) for column in rows))
                reports.append(metrics.compute(dist.group.WORLD))
        (out / f"{world.rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
