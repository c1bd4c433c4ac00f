"""Ranks of test_search.py: train with five searches, stop and resume, evaluate.

    torchrun --nproc-per-node 2 -m tests.distributed.search_ranks OUT DATASET

The results are written to OUT/outcome.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.distributed.resume_ranks import STOP_AFTER, run
from trainer.config.ranker import JobConfig, load_config
from trainer.data.features import search_copy
from trainer.data.features.search_vectors import SearchSpace
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.evaluation import evaluate, predict
from trainer.ranking.search_refresh import SearchSpaceRefresher
from trainer.ranking.setup import held_out_loader, split_in_time
from trainer.runtime.distributed import World
from trainer.serving.trained_run import open_run

JOB = (
    "data.eval_from=2024-03-06",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    *(f"features.history.{name}.length=6" for name in ("short", "long", "author", "live_long", "mixed")),
    # The job file searches by content vectors, which this dataset lacks; here the trained tables are the search space.
    "features.search.tables=['item', 'author']",
    "features.search.embedding=",
    "features.search.refresh_steps=4",
    "features.author.ids=lookup",
    "features.author_side=['author_genre']",
    "features.exclude=[]",
    "data.train_from=",
    "data.shuffle_minutes=60",
    "data.workers=0",
    "train.batch_size=16",
    "train.epochs=1",
    "train.log_every=5",
    "checkpoint.every_steps=3",
    "train.device=cpu",
)


def job(dataset: Path, directory: Path, *overrides: str) -> JobConfig:
    return load_config("configs/cross.toml", [*JOB, f"data.path={dataset}", f"run.directory={directory}", *overrides])


@contextmanager
def recorded_versions(world: World) -> Iterator[list[tuple[int, bool, float]]]:
    """Record each version of the vectors, if it has all ranks' rows of the tables, and the sum of its values."""
    put = SearchSpaceRefresher._write_version
    versions: list[tuple[int, bool, float]] = []

    def recording(self: SearchSpaceRefresher, version: int) -> None:
        put(self, version)
        same = all(_is_copy(self.space, version, self._engine, world, name) for name in ("item", "author"))
        versions.append((version, same, float(self.space.at(version)["author"].astype(np.float64).sum())))

    SearchSpaceRefresher._write_version = recording  # type: ignore[method-assign]
    try:
        yield versions
    finally:
        SearchSpaceRefresher._write_version = put  # type: ignore[method-assign]


def _is_copy(space: SearchSpace, version: int, engine: HybridEngine, world: World, name: str) -> bool:
    """True if a version of the vectors equals the rows that all ranks hold of a table."""
    own = [(shard.row, shard.values.numpy().copy()) for shard in engine.table_shards() if shard.table == name]
    parts = world.agree(world.gather(own))
    here = space.at(version)[name]
    expected = np.zeros_like(here)
    for row, values in (part for of_rank in parts for part in of_rank):
        expected[row : row + len(values), : values.shape[1]] = values.astype(np.float16)
    expected[0] = 0
    return bool(np.array_equal(here, expected))


def evaluated(world: World, directory: Path, config: JobConfig) -> dict[str, Any]:
    """Return the metrics of a finished run that is opened again."""
    model = open_run(str(directory), world)
    split = split_in_time(config, model.data.spec)
    loader = held_out_loader(config, model.data, split, model.features, world, None, model.space)
    return evaluate(predict(model.engine, loader, quiet=True), model.features.behaviours, world.control)


def main(out: Path, dataset: Path) -> None:
    with World.join("cpu") as world:
        through = job(dataset, out / "through")
        with recorded_versions(world) as versions:
            outcome: dict[str, Any] = {"through": run(world, through), "versions": versions}
        outcome["workers"] = run(world, job(dataset, out / "workers", "data.workers=1", "data.prefetch=2"))
        with patch.object(search_copy, "pays", lambda *sizes: True):
            outcome["copies"] = run(world, job(dataset, out / "copies", "data.workers=2", "data.prefetch=1"))
        outcome["stopped"] = run(world, job(dataset, out / "stopped"), STOP_AFTER)
        outcome["resumed"] = run(world, job(dataset, out / "stopped"))
        on_device = "features.search.device=device"
        outcome["device"] = run(world, job(dataset, out / "device", on_device, "data.workers=1", "data.prefetch=2"))
        # Stopped with the searches on the device, and continued with those of the loader.
        run(world, job(dataset, out / "changed", on_device), STOP_AFTER)
        outcome["changed"] = run(world, job(dataset, out / "changed"))
        outcome["evaluated"] = evaluated(world, out / "through", through)
        if world.rank == 0:
            torch.save(outcome, out / "outcome.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
