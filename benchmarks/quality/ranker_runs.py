"""Train a ranker's job in this process, and predict its held-out rows: what benchmarks of quality share."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.manifest import DatasetEntry
from trainer.config.ranker import JobConfig
from trainer.console.progress import Progress
from trainer.data.features.feature_map import FeatureMap
from trainer.data.format.dataset import Dataset, fingerprint
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import HybridEngine
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.ranking.checkpoints import Checkpoints, Identity
from trainer.ranking.evaluation import Predictions, predict
from trainer.ranking.job_features import open_features
from trainer.ranking.search_refresh import SearchSpaceRefresher, make_space
from trainer.ranking.setup import Split, build_engine, held_out_loader, split_in_time, training_loader
from trainer.ranking.stream_train_loop import train_stream
from trainer.ranking.training_state import TrainingState
from trainer.ranking.training_stream import TrainingStream, open_stream
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids.store_address import open_existing_store
from trainer.stream.live.live_stream import PredictedOutcomes


@dataclass(frozen=True)
class TrainedRanker:
    """A ranker after its training on stored rows.

    Attributes:
        config: the job.
        world: ranks, one.
        data: the dataset.
        split: times of the training and of the held-out rows.
        features: of the model.
        engine: the model.
        searching: of the vectors that histories are searched with; None without such a search.
        steps, rows: steps of the training and rows that it read.
        seconds: processor time of the training, without set-up.
    """

    config: JobConfig
    world: World
    data: Dataset
    split: Split
    features: FeatureMap
    engine: HybridEngine
    searching: SearchSpaceRefresher | None
    steps: int
    rows: int
    seconds: float

    def predict(self) -> Predictions:
        """Return predictions of the held-out rows; nothing is trained."""
        space = None if self.searching is None else self.searching.space
        loader = held_out_loader(self.config, self.data, self.split, self.features, self.world, None, space)
        return predict(self.engine, loader, quiet=True)


def opened(config: JobConfig, world: World) -> tuple[Dataset, Split, FeatureMap]:
    """Open the dataset of a job; return it, the times of its rows, and the features of its model."""
    data = Dataset.open(config.data.path)
    split = split_in_time(config, data.spec)
    with tempfile.TemporaryDirectory() as folder:
        features = open_features(config, data, split, Path(folder) / "features", world, open_existing_store)
    return data, split, features


@contextmanager
def trained_ranker(config: JobConfig, world: World) -> Iterator[TrainedRanker]:
    """Train the network of a job on its training range, without checkpoints, traces and reports."""
    data, split, features = opened(config, world)
    engine = build_engine(config, features, config.model.kind, world)
    space = make_space(config, features)
    searching = None if space is None else SearchSpaceRefresher(space, config, features, engine, world)
    if searching is not None:
        searching.begin()
    loader = training_loader(config, data, split, features, world, space=space)
    started = time.process_time()
    steps = _train(engine, loader, config, searching)
    seconds = time.process_time() - started
    try:
        yield TrainedRanker(config, world, data, split, features, engine, searching, steps, loader.rows_total, seconds)
    finally:
        engine.close()


def train_and_predict(config: JobConfig, world: World) -> tuple[Predictions, tuple[str, ...]]:
    """Train the network of a job on its training range, and predict its held-out rows.

    Returns:
        Predictions of the held-out rows, and the behaviours in their columns.
    """
    with trained_ranker(config, world) as ranker:
        return ranker.predict(), ranker.features.behaviours


@dataclass(frozen=True)
class StreamedPredictions:
    """Predictions of the requests of a stream, each by the model as it was at the request.

    Attributes:
        visit_id: ``[n]`` int64, in any order.
        probability: ``[n, behaviours]`` float32.
        rows: rows trained on.
        seconds: processor time of the stream.
    """

    visit_id: np.ndarray
    probability: np.ndarray
    rows: int
    seconds: float


def continue_on_stream(ranker: TrainedRanker, config: JobConfig) -> StreamedPredictions:
    """Train a ranker further on the stream of a job, from its beginning to its end, and keep no checkpoint.

    Args:
        ranker: trained on the days before the stream.
        config: job with a section ``[stream]``, otherwise with the features and the network of the ranker.
    """
    answers: list[PredictedOutcomes] = []

    def listen(stream: TrainingStream) -> None:
        stream.observe = answers.append

    started = time.process_time()
    facts = run_stream(
        ranker.engine, config, ranker.data, ranker.features, ranker.world, listen, ranker.searching, ranker.steps
    )
    seconds = time.process_time() - started
    visit_id = np.concatenate([answer.rows["visit_id"] for answer in answers])
    logits = torch.from_numpy(np.concatenate([answer.logits for answer in answers]))
    return StreamedPredictions(visit_id, torch.sigmoid(logits).float().numpy(), facts["rows"], seconds)


def run_stream(
    engine: HybridEngine,
    config: JobConfig,
    data: Dataset,
    features: FeatureMap,
    world: World,
    prepare: Callable[[TrainingStream], None],
    searching: SearchSpaceRefresher | None = None,
    steps: int = 0,
) -> dict[str, Any]:
    """Train an engine on the stream of a job, on one rank, and keep no checkpoint.

    Args:
        engine: the model.
        config: job with a section ``[stream]``.
        data: its dataset.
        features: of the model.
        world: ranks, one.
        prepare: called with the stream before it begins.
        searching: of the vectors that histories are searched with.
        steps: that the model was trained before; the versions of the search vectors go by the number of steps.

    Returns:
        ``steps`` and ``rows`` trained on, and the content of ``TrainingStream.summary``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = Path(temporary)
        stream = open_stream(config, data, split_in_time(config, data.spec), features, world, model_dir)
        prepare(stream)
        dataset = DatasetEntry(path=config.data.path, fingerprint=fingerprint(config.data.path, data.spec))
        identity = Identity(config, config.model.kind, features.behaviours, dataset)
        checkpoints = Checkpoints(model_dir / "checkpoints", identity, world)
        state = TrainingState.at_start(features.behaviours, stream, None if searching is None else searching.space)
        state.step = steps
        with stream.open(None) as reader:
            train_stream(
                engine,
                stream,
                reader,
                state,
                checkpoints,
                config=config,
                world=world,
                preemption=Preemption(),
                model_dir=model_dir,
                searching=searching,
            )
        facts = {"steps": state.step - steps, "rows": state.rows_done, **stream.summary(world, state.progressive)}
        checkpoints.close()
    return facts


def subset(predictions: Predictions, rows: Tensor) -> Predictions:
    """Return the predictions of some rows, ``[n] bool``."""
    return replace(predictions, **{field.name: getattr(predictions, field.name)[rows] for field in fields(predictions)})


def _train(engine: HybridEngine, loader: Loader, config: JobConfig, searching: SearchSpaceRefresher | None) -> int:
    """Train all steps of a job, and return their number."""
    schedule, total, done, steps = config.optimizer, loader.rows_total, 0, 0

    def set_learning_rates() -> None:
        place, end = done / config.train.batch_size, total / config.train.batch_size
        factor = learning_rate_factor(place, end, schedule.warmup, schedule.decay)
        engine.set_learning_rate(config.tables.learning_rate * factor, schedule.learning_rate * factor)

    set_learning_rates()
    with Progress("train", total, "rows") as progress:
        for result in engine.steps(iter(loader)):
            done, steps = done + result.rows_global, steps + 1
            if searching is not None:
                searching.after_step(steps)
            progress.advance(result.rows_global, f"loss {float(result.loss):.4f}")
            set_learning_rates()
    if searching is not None:
        searching.finish()
    return steps
