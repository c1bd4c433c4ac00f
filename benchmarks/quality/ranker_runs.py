"""Train a ranker's job in this process, and predict its held-out rows: what benchmarks of quality share."""

from __future__ import annotations

import tempfile
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from trainer.config.ranker import JobConfig
from trainer.console.progress import Progress
from trainer.data.format.dataset import Dataset
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import HybridEngine
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.ranking.evaluation import Predictions, predict
from trainer.ranking.job_features import open_features
from trainer.ranking.search_refresh import SearchSpaceRefresher, make_space
from trainer.ranking.setup import build_engine, held_out_loader, split_in_time, training_loader
from trainer.runtime.distributed import World
from trainer.semantic_ids.store_address import open_existing_store


def train_and_predict(config: JobConfig, world: World) -> tuple[Predictions, tuple[str, ...]]:
    """Train the network of a job on its training range, without checkpoints, traces and reports.

    Returns:
        Predictions of the held-out rows, and the behaviours in their columns.
    """
    data = Dataset.open(config.data.path)
    split = split_in_time(config, data.spec)
    with tempfile.TemporaryDirectory() as folder:
        features = open_features(config, data, split, Path(folder) / "features", world, open_existing_store)
    engine = build_engine(config, features, config.model.kind, world)
    space = make_space(config, features)
    if space is not None:
        SearchSpaceRefresher(space, config, features, engine, world).begin()
    _train(engine, training_loader(config, data, split, features, world, space=space), config)
    held_out = predict(engine, held_out_loader(config, data, split, features, world, None, space), quiet=True)
    engine.close()
    return held_out, features.behaviours


def subset(predictions: Predictions, rows: Tensor) -> Predictions:
    """Return the predictions of some rows, ``[n] bool``."""
    return replace(predictions, **{field.name: getattr(predictions, field.name)[rows] for field in fields(predictions)})


def _train(engine: HybridEngine, loader: Loader, config: JobConfig) -> None:
    """Train all steps of a job."""
    schedule, total, done = config.optimizer, loader.rows_total, 0

    def set_learning_rates() -> None:
        place, end = done / config.train.batch_size, total / config.train.batch_size
        factor = learning_rate_factor(place, end, schedule.warmup, schedule.decay)
        engine.set_learning_rate(config.tables.learning_rate * factor, schedule.learning_rate * factor)

    set_learning_rates()
    with Progress("train", total, "rows") as progress:
        for result in engine.steps(iter(loader)):
            done += result.rows_global
            progress.advance(result.rows_global, f"loss {float(result.loss):.4f}")
            set_learning_rates()
