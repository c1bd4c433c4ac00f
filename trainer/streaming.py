"""Training on a stream: predict what is requested, learn what is known, save where both stand.

Event time passes in slices that all ranks share. After each slice visits have begun and ended and rows have become
complete. When there are enough rows for a step, or they have waited for long enough, first the requests so far are
predicted by the model as it is; then outcomes are compared with what was predicted of them; then the model is trained.
So every prediction is made by a model that has learnt nothing of that moment or later, with histories as of the request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from trainer.checkpoint import Checkpoints
from trainer.config import JobConfig
from trainer.data.batch import Batch, unpack
from trainer.data.features import FeatureMap
from trainer.data.growing_history import GrowingHistories
from trainer.data.schema import Rows
from trainer.distributed import World
from trainer.engine import HybridEngine, NotFiniteLoss
from trainer.errors import UserError
from trainer.log import say, set_step
from trainer.preemption import Preempted, Preemption
from trainer.progress import Progress
from trainer.stream.aside import AsideLog
from trainer.stream.freshness import Freshness
from trainer.stream.live import Answered, LiveStream
from trainer.stream.rows import END_OF_TIME, SLOW
from trainer.stream.slices import Slices
from trainer.stream.source import Reader
from trainer.training import keep_batch, write_scalars
from trainer.training_state import TrainingState, Window
from trainer.watchdog import Watchdog

Observe = Callable[[Answered], None]
"""Called with outcomes and what was predicted of them, on each rank, as they become known."""


class StreamTraining:
    """The training of one model on a stream, from wherever it stands.

    Args:
        engine: the model.
        features: makes its batches.
        histories: of this rank's users.
        live: what this rank knows of the stream; histories grow with it.
        state: of the training so far; advanced.
        config: the job.
        world: its ranks.
        measured: measure the time from events to what has learnt from them, which has a meaning in real time only.
        observe: is told of outcomes.
    """

    def __init__(
        self,
        engine: HybridEngine,
        features: FeatureMap,
        histories: GrowingHistories,
        live: LiveStream,
        state: TrainingState,
        *,
        config: JobConfig,
        world: World,
        measured: bool,
        observe: Observe = lambda answered: None,
    ) -> None:
        assert config.stream is not None
        self._engine, self._features, self._histories, self._live = engine, features, histories, live
        self.state, self._config, self._world, self._observe = state, config, world, observe
        self._disorder_ms = config.labels.patience.disorder_ms
        self._flush_ms = round(config.stream.flush_seconds * 1000)
        self._flushed_ms = 0
        self._flushed_at = time.monotonic()
        self.freshness = Freshness() if measured else None

    def run(
        self,
        reader: Reader,
        checkpoints: Checkpoints,
        preemption: Preemption,
        home: Path,
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        """Until the stream ends, or this job is asked to stop."""
        raise NotImplementedError
