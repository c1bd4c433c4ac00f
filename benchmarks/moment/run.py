"""One training on the stream of a simulated world, for :mod:`benchmarks.moment`.

It uses the parts of ``trainer.rank`` that train on a stream, with callbacks for predictions and delays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from benchmarks.moment.world import WorldSize
from benchmarks.quality.ranker_runs import run_stream
from trainer.config.ranker import JobConfig, load_config
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import fit_features
from trainer.data.format.dataset import Dataset
from trainer.data.simulator.config import START_MS, TIMEZONE
from trainer.ranking.setup import build_engine, split_in_time
from trainer.ranking.training_stream import TrainingStream
from trainer.runtime.distributed import World
from trainer.stream.live.live_stream import PredictedOutcomes

BASE = "configs/moment.toml"
POLICIES = ("full", "fast_slow", "realtime", "realtime_naive")

JOB = (
    "features.history={}",
    "model.kind=cgc",
    "model.task_experts=1",
    "model.shared_experts=1",
    "model.expert_layers=[[64, 32]]",
    "model.tower=[16]",
    "stream.slice_seconds=5",
    "stream.flush_seconds=10",
    "labels.idle_minutes=30",
    "train.batch_size=8192",
    "train.device=cpu",
    "checkpoint.every_minutes=0",
)
"""Changes to ``BASE`` that all trainings share: a small network, and a step every 10 s of event time."""


def stream_job(dataset: Path, size: WorldSize, policy: str, seed: int, settings: Sequence[str]) -> JobConfig:
    """Return the job of one training on a world; ``settings`` are written as on the command line."""
    begin_ms = START_MS + 1000 * size.warm_up_s
    own = (
        f"data.path={dataset}",
        f"data.train_until={_moment(begin_ms)}",
        f"stream.until={_moment(begin_ms + 1000 * size.stream_s)}",
        f"labels.policy={policy}",
        f"run.seed={seed}",
    )
    return load_config(BASE, [*JOB, *own, *settings])


@dataclass(frozen=True)
class StreamPredictions:
    """Predictions for the n exposures of a stream at the time of their request, in any order.

    Attributes:
        visit_id: ``[n]`` int64.
        probability: ``[n, behaviours]`` float32.
        facts: of the training: ``steps``, ``rows`` and the content of ``TrainingStream.summary``.
    """

    visit_id: np.ndarray
    probability: np.ndarray
    facts: dict[str, Any]


def predict_stream(config: JobConfig, world: World) -> StreamPredictions:
    """Train on a stream from its beginning to its end, on one rank, and return all predictions."""
    answers: list[PredictedOutcomes] = []

    def listen(stream: TrainingStream) -> None:
        stream.observe = answers.append

    facts = train_on(config, world, listen)
    visit_id = np.concatenate([answer.rows["visit_id"] for answer in answers])
    logits = np.concatenate([answer.logits for answer in answers])
    return StreamPredictions(visit_id, (1 / (1 + np.exp(-logits))).astype(np.float32), facts)


def train_on(config: JobConfig, world: World, prepare: Callable[[TrainingStream], None]) -> dict[str, Any]:
    """Train on the stream of a job, on one rank, and keep no checkpoint; call ``prepare`` with the stream before it.

    Returns:
        ``steps``, ``rows`` trained on, and the content of ``TrainingStream.summary``.
    """
    data = Dataset.open(config.data.path, config.data.on_corrupt)
    split = split_in_time(config, data.spec)
    fitted = fit_features(data.spec, data.store, data.histories, config.features, split.fitting)
    features = FeatureMap(data.spec, config.features, fitted, config.data.behaviours)
    engine = build_engine(config, features, config.model.kind, world)
    facts = run_stream(engine, config, data, features, world, prepare)
    engine.close()
    return facts


def _moment(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, ZoneInfo(TIMEZONE)).isoformat()
