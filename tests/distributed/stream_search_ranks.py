"""Ranks of test_stream_search.py: train on a stream with searches on the host and on the device, stop and resume.

    torchrun --nproc-per-node 2 -m tests.distributed.stream_search_ranks OUT DATASET

The results are written to OUT/outcome.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.resume_ranks import run, without_plots
from tests.distributed.stream_ranks import JOB, SEARCHING, STOP_AFTER
from trainer.config.ranker import JobConfig, load_config
from trainer.runtime.distributed import World


def job(dataset: Path, directory: Path, device: str) -> JobConfig:
    settings = [
        *JOB,
        *SEARCHING,
        "features.history.live.search=top",
        "features.item.ids=dynamic",
        "features.item.rows=400",
        "features.search.tables=['author']",
        "stream.publish_minutes=0",
        "data.eval_from=2024-03-05T18:00",
        f"data.path={dataset}",
        f"run.directory={directory}",
        f"features.search.device={device}",
    ]
    return load_config("configs/moment.toml", settings)


def main(out: Path, dataset: Path) -> None:
    without_plots()
    with World.join("cpu") as world:
        outcome: dict[str, Any] = {
            "cpu": run(world, job(dataset, out / "cpu", "cpu")),
            "device": run(world, job(dataset, out / "device", "device"), later=True),
        }
        for first, then in (("cpu", "device"), ("device", "cpu")):
            directory = out / f"{first}-{then}"
            run(world, job(dataset, directory, first), STOP_AFTER)
            outcome[f"{first}-{then}"] = run(world, job(dataset, directory, then))
        if world.rank == 0:
            torch.save(outcome, out / "outcome.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
