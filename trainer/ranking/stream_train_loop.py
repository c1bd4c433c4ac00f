"""Training on a stream: predict new requests, train on complete rows, and save checkpoints.

All ranks process event time in shared slices. In a slice, visits start and end, and rows become complete. When there
are enough rows for a step, or rows have waited long enough, three things happen in this order: the model predicts the
requests so far; outcomes are compared with their predictions; the model is trained. So every prediction comes from a
model that has learnt nothing of that moment or later, with histories as of the request.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.console.progress import Progress
from trainer.console.run_log import set_step
from trainer.data.features.id_map import beyond_message
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.format.schema import Rows
from trainer.data.loading.batch import RankingBatch, unpack
from trainer.engine.build_engine import rows_per_rank
from trainer.engine.hybrid_engine import HybridEngine, NotFiniteLoss, StepResult
from trainer.ranking.checkpoints import Checkpoints
from trainer.ranking.growing_device_histories import GrowingDeviceHistories
from trainer.ranking.search_refresh import SearchSpaceRefresher
from trainer.ranking.train_loop import keep_batch, write_scalars
from trainer.ranking.training_state import TrainingState
from trainer.ranking.training_stream import TrainingStream
from trainer.runtime.distributed import World
from trainer.runtime.host_copy import HostCopy
from trainer.runtime.preemption import Preempted, Preemption
from trainer.runtime.scalars import open_scalars
from trainer.runtime.watchdog import Watchdog
from trainer.stream.labels.assembled_rows import END_OF_TIME, SLOW
from trainer.stream.sources.source import StreamReader
from trainer.stream.sources.time_slices import TimeSlices

logger = logging.getLogger(__name__)


def train_stream(
    engine: HybridEngine,
    stream: TrainingStream,
    reader: StreamReader,
    state: TrainingState,
    checkpoints: Checkpoints,
    *,
    config: JobConfig,
    world: World,
    preemption: Preemption,
    model_dir: Path,
    searching: SearchSpaceRefresher | None = None,
    on_device: GrowingDeviceHistories | None = None,
) -> None:
    """Train slice by slice until the stream of every rank has ended.

    Args:
        engine: model to train.
        stream: stream state of this rank at the position of ``state``; advanced.
        reader: reader of this rank's partitions from that position on.
        state: training state; advanced.
        checkpoints: checkpoints to save at intervals, at the end, and when the job is asked to stop.
        config: config of the job.
        world: ranks of the job.
        preemption: tells if this process was asked to stop.
        model_dir: directory of the model's files.
        searching: updates the vectors of the history search; None without such a search.
        on_device: copy of the histories on the device, which searches them; None if they are searched on the host.

    Raises:
        UserError: the stream cannot be read any further; the loss is not finite; a checkpoint cannot be written.
        Preempted: a rank was asked to stop; the state is saved.
    """
    settings = config.stream
    assert settings is not None
    slices = TimeSlices(reader, world, stream.slice_ms, settings.linger_seconds if settings.endless else None)
    trainer = _StreamTrainer(engine, stream, state, config, world, model_dir, searching, on_device)
    engine.set_learning_rate(config.tables.learning_rate, config.optimizer.learning_rate)
    saved_step, pushed = state.step, 0
    with (
        preemption.deferred(),
        Watchdog(world, config.train.watchdog_seconds) as watchdog,
        Progress("stream", 0, "events", quiet=world.rank > 0) as progress,
        state.recording(engine, world),
    ):
        while True:
            # A list and not a generator, because asking about a due step restarts the interval.
            due = any([checkpoints.is_due(step) for step in range(saved_step + 1, state.step + 1)])
            saved_step, lag = state.step, reader.lag()
            # One all-gather per slice carries everything that the ranks must decide together.
            users = 0 if stream.users is None else stream.users.unexchanged
            values = (*trainer.waiting(), due, preemption.asked, users, pushed, lag.waiting, lag.event_ms)
            agreed = slices.agree(tuple(map(int, values)))
            rows, pending, by_clock, save, stop, users, events, behind, _ = agreed.values.sum(axis=0).tolist()
            if users and stream.users is not None:
                stream.users.exchange(world)
            # The total grows with the stream; nobody knows its end.
            progress.total = progress.done + events + behind
            progress.advance(events, trainer.progress_note(behind, int(agreed.values[:, -1].max())))
            if agreed.finished:
                break
            # Train before taking the next slice, so that the model knows nothing of the requests it will predict.
            if pending and trainer.is_due(rows, agreed.number, by_clock > 0):
                trainer.flush(rows, agreed.number)
            checkpoints.check()
            # Between two slices the position, the open visits and the model agree, so a save loses and repeats nothing.
            if save or stop:
                state.position = slices.position
                with watchdog.busy("saving a checkpoint"):
                    checkpoints.save(engine, state, wait=stop > 0)
            if stop:
                raise Preempted
            pushed = 0
            if agreed.number is not None:
                # A rank without events in this slice still advances its watermark.
                batches = slices.take(agreed.number)
                pushed = stream.take(batches, slices.seen_until_ms(agreed.number))
            watchdog.beat(state.step)
        # The end of the stream ends every open visit, so the last rows become complete.
        stream.take([], END_OF_TIME)
        with watchdog.busy("training on the last rows"):
            trainer.flush(world.sum(stream.live.trainable(END_OF_TIME)), None)
        with watchdog.busy("saving the last checkpoint"):
            state.finished, state.position = True, slices.position
            checkpoints.save(engine, state, wait=True)
        trainer.close()


class _StreamTrainer:
    """Predicts and trains on buffered requests and rows."""

    def __init__(
        self,
        engine: HybridEngine,
        stream: TrainingStream,
        state: TrainingState,
        config: JobConfig,
        world: World,
        model_dir: Path,
        searching: SearchSpaceRefresher | None,
        on_device: GrowingDeviceHistories | None,
    ) -> None:
        assert config.stream is not None
        self._engine, self._stream, self._state, self._config, self._world = engine, stream, state, config, world
        self._model_dir, self._searching, self._on_device = model_dir, searching, on_device
        self._flush_ms = round(config.stream.flush_seconds * 1000)
        self._batch_rows = rows_per_rank(config, world.size)
        self._endless = config.stream.endless
        self._flushed_at = time.monotonic()
        self._lag = (0, 0)
        self._beyond: Counter[str] = Counter()
        self._searched_beyond: torch.Tensor | None = None
        self._missing, self._missing_logged = MissingTally(), False
        self._loss = float("nan")
        self._scalars = None
        if world.rank == 0:
            # Points after the checkpoint belong to steps that are repeated now.
            self._scalars = open_scalars(model_dir / "tensorboard", state.step)

    def close(self) -> None:
        """Record the metrics of the last steps, and close the scalars."""
        if self._state.window.rows:
            self._prepare_entry()()
        self._state.settle()
        if self._scalars is not None:
            self._scalars.close()

    def waiting(self) -> tuple[int, int, bool]:
        """Return this rank's rows to train on, all rows and requests of a flush, and True if the clock makes it due."""
        live = self._stream.live
        rows = live.trainable(self._trainable_ms)
        # The clock matters only for a topic that falls silent. One rank decides, because clocks differ.
        late = time.monotonic() - self._flushed_at >= self._flush_ms / 1000
        return rows, rows + live.unpredicted, self._endless and late and self._world.rank == 0

    def is_due(self, rows: int, number: int | None, by_clock: bool) -> bool:
        """True if the ranks, with ``rows`` rows together, train before the slice ``number``."""
        if rows >= self._config.train.batch_size or by_clock:
            return True
        return number is not None and number * self._stream.slice_ms - self._stream.flushed_ms >= self._flush_ms

    def flush(self, rows: int, number: int | None) -> None:
        """Predict requests, compare outcomes with predictions, and train. Collective.

        Args:
            rows: number of rows to train on, over all ranks.
            number: number of the next slice; None if no events have arrived or the stream has ended.

        Raises:
            UserError: the loss is not finite.
        """
        # The histories stay as they are until the next slice is taken.
        if self._on_device is not None and not self._on_device.update():
            self._on_device = None
        # Predictions come first: a prediction must not know the labels that train the model now.
        self._predict()
        try:
            self._train(-(-rows // self._config.train.batch_size))
        except NotFiniteLoss as stopped:
            raise UserError(keep_batch(stopped, self._model_dir, self._world.rank)) from None
        if self._searching is not None:
            self._searching.catch_up(self._state.step)
        self._average(number)
        if number is not None:
            self._stream.flushed_ms = number * self._stream.slice_ms
        self._flushed_at = time.monotonic()

    def progress_note(self, behind: int, lag_ms: int) -> str:
        """Return the text of the progress line beside the number of events."""
        self._lag = behind, lag_ms
        return f"step {self._state.step}, loss {self._loss:.4f}, lag {behind:,} events and {lag_ms / 1000:,.0f} s"

    @property
    def _trainable_ms(self) -> int:
        """Time before which labels must be complete for a row to be trained on.

        Requests are predicted up to the watermark, ``max_out_of_orderness_ms`` behind the events seen. At the time of
        such a request, a live stream had only handed out rows that were older by ``max_out_of_orderness_ms``. So rows
        wait for that long too, and no prediction knows labels that were not known at its request.
        """
        seen_until_ms = self._stream.seen_until_ms
        if seen_until_ms == END_OF_TIME:
            return END_OF_TIME
        return seen_until_ms - 2 * self._config.labels.max_out_of_orderness_ms

    def _predict(self) -> None:
        """Predict the new requests, and update the progressive metrics with new outcomes."""
        stream = self._stream
        requests = stream.live.take_requests()
        cuts = range(self._batch_rows, len(requests["user_id"]), self._batch_rows)
        parts = _split(requests, np.array(cuts, np.int64))
        # A rank without requests takes part with no batch, because the lookup of ids is collective.
        predictions = self._engine.predict(self._batch(part) for part in parts if len(part["user_id"]))
        logits = []
        for batch, of_batch in predictions:
            self._count_beyond(batch)
            logits.append(of_batch.cpu().numpy())
        stream.live.add_predictions(requests, np.concatenate([np.empty((0, len(stream.features.behaviours))), *logits]))
        outcomes = stream.live.take_outcomes()
        columns = stream.features.label_columns
        mask = outcomes.rows["mask"][:, columns]
        self._state.predicted(
            torch.from_numpy(outcomes.rows["user_id"]),
            torch.from_numpy(outcomes.logits),
            torch.from_numpy(outcomes.rows["label"][:, columns] & mask),
            torch.from_numpy(mask),
        )
        stream.observe(outcomes)

    def _train(self, steps: int) -> None:
        """Train on all trainable rows of this rank in ``steps`` steps; every rank makes the same number."""
        if not steps:
            return
        rows = self._stream.live.take_rows(self._trainable_ms)
        n = len(rows["user_id"])
        # Ranks have different numbers of rows, but all must make the same number of steps.
        parts = _split(rows, np.array([n * step // steps for step in range(1, steps)], np.int64))
        batches = (self._batch(part) for part in parts)
        for part, result in zip(parts, self._engine.steps(batches), strict=True):
            self._count(part, result)
        self._state.read()

    def _average(self, number: int | None) -> None:
        """Add the dense network's weights to their mean over event time; ``number`` is that of the next slice."""
        assert self._config.stream is not None
        if not self._config.averages:
            return
        stream, elapsed_ms = self._stream, self._flush_ms
        # The first rows, and those of a topic that is silent or has ended, count as an ordinary interval.
        if number is not None and stream.flushed_ms:
            elapsed_ms = number * stream.slice_ms - stream.flushed_ms
        self._engine.average(elapsed_ms / (self._config.stream.average_hours * 3_600_000))

    def _count(self, rows: Rows, result: StepResult) -> None:
        """Advance the training state by a step, and count the freshness of its positives."""
        state, freshness = self._state, self._stream.freshness
        self._count_beyond(result.batch)
        state.advance(result)
        set_step(state.step)
        state.when_read(partial(self._keep_loss, result))
        if freshness is not None:
            positive = (rows["label"] & rows["mask"]) > 0
            freshness.add(self._stream.live.arrived_ms(rows), positive, round(time.time() * 1000))
        if state.step % self._config.train.log_every == 0:
            state.when_read(self._prepare_entry())

    def _keep_loss(self, result: StepResult) -> None:
        """Keep the loss of a step for the progress line."""
        self._loss = result.values.loss

    def _prepare_entry(self) -> Callable[[], None]:
        """Log the missing inputs, and return a function that adds the entry of the metric history. Collective."""
        state = self._state
        log_beyond = self._prepare_beyond()
        missing, self._missing = self._missing, MissingTally()
        # At first, and when most candidates lack a code: then the file ends too early, or the store is not filled.
        if missing.counts and (not self._missing_logged or missing.mostly):
            for message in missing.messages():
                logger.info(f"step {state.step:,}: {message}")
            self._missing_logged = True
        # Facts as of this step: the next one is under way when its values are read.
        step, ids = state.step, self._engine.id_counts()
        lag = {"lag_events": self._lag[0], "lag_seconds": self._lag[1] / 1000}

        def write(entry: dict[str, Any]) -> None:
            if self._scalars is not None:
                write_scalars(self._scalars, entry)
                for name, value in (lag | missing.shares()).items():
                    self._scalars.add_scalar(name, value, step)

        def record() -> None:
            log_beyond()
            state.record_entry(step, ids, lag, write)

        return record

    def _count_beyond(self, batch: RankingBatch) -> None:
        """Count the direct ids beyond their tables that the device has found for a batch."""
        if (found := batch.searched_beyond) is not None:
            self._searched_beyond = found if self._searched_beyond is None else self._searched_beyond + found

    def _prepare_beyond(self) -> Callable[[], None]:
        """Return a function that logs the direct ids beyond their tables so far, and begin to count anew."""
        beyond, searched, step = self._beyond, self._searched_beyond, self._state.step
        self._beyond, self._searched_beyond = Counter(), None
        copy = None if searched is None else HostCopy([searched])

        def log() -> None:
            if copy is not None:
                beyond["histories"] += round(sum(copy.numbers()))
            if beyond.total():
                logger.info(f"step {step:,}: {beyond_message(beyond)}")

        return log

    def _batch(self, rows: Rows) -> RankingBatch:
        """Return rows as a batch of the model, with histories as of each request."""
        stream = self._stream
        space = self._state.space
        vectors = None if space is None else space.at(space.newest)
        searched = vectors if self._on_device is None else self._on_device.places
        packed = stream.features.pack(rows, stream.histories, rows["request_ms"], searched)
        if space is not None:
            packed = replace(packed, version=space.newest)
        on_gpu = self._world.device.type == "cuda"
        if on_gpu:
            # Copies from pageable memory would wait for the device.
            packed = packed.pin_memory()
        self._beyond.update(packed.beyond)
        self._missing.add(packed.missing)
        batch = unpack(packed, stream.features.layout, {})
        if self._config.labels.policy != "fast_slow":
            return batch
        # This policy has a loss of its own for slow rows.
        slow = torch.from_numpy(rows["kind"] == SLOW)
        return replace(batch, slow=slow.pin_memory() if on_gpu else slow)


def _split(rows: Rows, cuts: np.ndarray) -> list[Rows]:
    """Split rows at the positions ``cuts``."""
    edges = [0, *cuts.tolist(), len(rows["user_id"])]
    return [{name: column[start:stop] for name, column in rows.items()} for start, stop in pairwise(edges)]
