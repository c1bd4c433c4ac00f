"""Ranks of test_stream.py: train on a stream undisturbed, stopped halfway, and resumed from there.

    torchrun --nproc-per-node N -m tests.distributed.stream_ranks START OUT DATASET [EARLIER ...]

It does the same as ``resume_ranks``, with a replayed stream in place of stored rows.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.data.code_files import codes_beside
from tests.data.vector_tables import vectors_beside
from tests.distributed.resume_ranks import run, without_plots
from trainer.config.ranker import JobConfig, load_config
from trainer.runtime.distributed import World

POLICIES = ("realtime", "fast_slow")

JOB = (
    "data.train_until=2024-03-05",
    "stream.until=2024-03-05T12:00",
    "stream.slice_seconds=300",
    "stream.flush_seconds=1800",
    "stream.batch_events=200",
    "stream.average_hours=3",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "model.dropout=0.2",
    "features.history.short.length=5",
    "features.history.live.length=5",
    "train.batch_size=64",
    "train.log_every=5",
    "checkpoint.every_steps=4",
    "checkpoint.every_minutes=0",
    "train.device=cpu",
)
PUBLISHING = "stream.publish_minutes=0.0001"
"""A run that publishes every checkpoint; one that is stopped and resumed without this trains in the same way."""

SEARCHING = (
    "features.history.long.domain=video",
    "features.history.long.search=top",
    "features.history.long.length=5",
    "features.search.refresh_steps=3",
)
"""Additional settings of one label policy: a history search whose vectors are refreshed during training."""

STOP_AFTER = 7
"""Step of SIGTERM: at this time rows are buffered, visits are open, and predictions wait for their outcome."""


def job(dataset: Path, directory: Path, policy: str, *overrides: str) -> JobConfig:
    more = (*SEARCHING, codes_beside(dataset)) if policy == "fast_slow" else vectors_beside(dataset)
    settings = [
        *JOB,
        *more,
        f"labels.policy={policy}",
        f"data.path={dataset}",
        f"run.directory={directory}",
        *overrides,
    ]
    return load_config("configs/moment.toml", settings)


def main(start: str, out: Path, dataset: Path, earlier: list[str]) -> None:
    if earlier:
        without_plots()
    with World.join("cpu") as world:
        outcome: dict[str, Any] = {}
        for policy in POLICIES:
            results = outcome[policy] = {"resumed": {}}
            if not earlier:
                results["through"] = run(world, job(dataset, out / start / policy / "through", policy, PUBLISHING))
                # One report, of the first policy, is enough.
                without_plots()
                stopped = out / start / policy / "stopped"
                results["stopped"] = run(world, job(dataset, stopped, policy), STOP_AFTER)
                if world.rank == 0:
                    shutil.copytree(stopped, out / start / policy / "kept")
                world.barrier()
                results["resumed"][start] = run(world, job(dataset, stopped, policy), later=True)
            for name in earlier:
                directory = out / start / policy / f"from-{name}"
                if world.rank == 0:
                    shutil.copytree(out / name / policy / "kept", directory)
                world.barrier()
                results["resumed"][name] = run(world, job(dataset, directory, policy))
        if world.rank == 0:
            torch.save(outcome, out / f"{start}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
