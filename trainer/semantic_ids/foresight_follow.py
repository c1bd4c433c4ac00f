"""Forecasts and training of a predictor in the order of time: Foresight's two passes at every tick.

A tick is a range of event time. At each tick

1. every segment that became known in it gets its forecast, by the predictor after the training of the ticks before;
2. the targets that became known in it wait for a full batch. Each full batch is an optimizer step.

So a forecast depends on the codes that were known when its segment became known, and on the targets of earlier ticks,
and on nothing else: not on the number of later segments, not on the batch it is computed in. The predictor changes only
with a step, so the segments of all ticks between two steps are computed together.

The last tick of the data is open: a later segment may still belong to it. Its targets are trained on when a segment of
a later tick is there. So a run on a part of the data, continued on all of it, gives the bits of a run on all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from trainer.checkpoint.manifest import FORESIGHT, MODEL, DatasetEntry, Manifest, read_manifest
from trainer.checkpoint.step_checkpoints import StepCheckpoints, StepIdentity, StepState
from trainer.config.diff import differences, flat_settings
from trainer.config.foresight import ForesightConfig
from trainer.config.iso_time import time_text
from trainer.console.errors import UserError, failure_reason
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.engine.step_loop import StepDone, run_steps
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.foresight_data import CodedRows, fingerprint, make_rows, open_version
from trainer.semantic_ids.foresight_engine import PredictorEngine
from trainer.semantic_ids.foresight_forecast import (
    Forecaster,
    ForecastSegments,
    ForecastSpool,
    forecast_origins,
    table_widths,
)
from trainer.semantic_ids.foresight_model import TrainedPredictor
from trainer.semantic_ids.foresight_rows import ForesightRows, SegmentContexts
from trainer.semantic_ids.foresight_training import ForesightState, ForesightWindow, PredictorSteps
from trainer.semantic_ids.segments import NO_LIMIT_MS, TimeRange, parse_range

logger = logging.getLogger(__name__)

FORECASTS = "forecasts"
"""Directory of the tables in a run."""


class FollowSchedule:
    """Segments and rows of each step, as a function of what became known before.

    Args:
        contexts: segments in the order in which they became known.
        rows: all rows.
        first, stop: places of the segments that have a forecast.
        since_ms: targets that became known earlier are not trained on.
        tick_ms: length of a tick.
        batch_size: rows of a step.

    Attributes:
        steps: number of steps.
        spans: ``[steps] float64``, event time in seconds from the step before to each step; 0 inside of a tick.
    """

    def __init__(
        self,
        contexts: SegmentContexts,
        rows: ForesightRows,
        first: int,
        stop: int,
        since_ms: int,
        tick_ms: float,
        batch_size: int,
    ) -> None:
        self._batch_size = batch_size
        # Stable: of targets that became known together the order is that of the rows, which are ordered by their times.
        order = np.argsort(rows.target_ms, kind="stable")
        target_ms = rows.target_ms[order]
        begin, end = np.searchsorted(target_ms, [since_ms, contexts.as_of_ms[stop - 1] + 1])
        self._earlier, self._order = order[:begin], order[begin:end]
        tick = contexts.as_of_ms[first:stop] // tick_ms
        due = target_ms[begin:end][batch_size - 1 :: batch_size] // tick_ms
        due = due[: np.searchsorted(due, tick[-1])]
        self.steps = len(due)
        self.spans = np.diff(due, prepend=tick[0] - 1) * tick_ms / 1000
        # A segment is forecast after the steps of earlier ticks.
        self._bounds = first + np.searchsorted(np.searchsorted(due, tick), np.arange(self.steps + 2))

    def step(self, step: int) -> np.ndarray:
        """Return the rows of step number ``step``, counted from 0."""
        return self._order[step * self._batch_size : (step + 1) * self._batch_size]

    def segments(self, step: int) -> tuple[int, int]:
        """Return the places ``[first, stop)`` of the segments that are forecast before a step; the last ones after."""
        return int(self._bounds[step]), int(self._bounds[step + 1])

    def targets_before(self, step: int) -> np.ndarray:
        """Return the rows whose targets became known before those of a step."""
        return np.concatenate([self._earlier, self._order[: step * self._batch_size]])


@dataclass(frozen=True)
class FollowData(CodedRows):
    """Data of a job. The fingerprint is of all segments that became known before ``until_ms``.

    Attributes:
        file: the code file.
        segments: its segments.
        first, stop: places of the segments that have a forecast.
        until_ms: end of the time of the segments that are read.
        schedule: segments and rows of each step.
        timezone: IANA name of the dataset's time zone.
        trained: predictor that the job starts from; None from scratch.
    """

    file: CodeFile
    segments: ForecastSegments
    first: int
    stop: int
    until_ms: int
    schedule: FollowSchedule
    timezone: str
    trained: TrainedPredictor | None

    @staticmethod
    def open(config: ForesightConfig) -> FollowData:
        """Open the data of a job.

        Raises:
            UserError: dataset, codes or codebook are missing or damaged, the codes are of another codebook version, a
                time is wrong, no segment is in the range, or the run to start from does not fit.
        """
        data, follow = config.data, config.follow
        assert follow is not None
        timezone = DatasetSpec.load(data.path).timezone
        version = open_version(data.codebook)
        trained = _open_trained(config, version.name) if follow.init_from else None
        first_ms = 0
        if trained is not None and not follow.since:
            trained.check_from("", NO_LIMIT_MS)
            first_ms = trained.seen_until_ms
        since, until = ("follow.since", follow.since), ("follow.until", follow.until)
        times = parse_range((*since, first_ms), (*until, NO_LIMIT_MS), timezone)
        if trained is not None:
            trained.check_from(f"follow.since = {follow.since}", times.from_ms)
        codes = read_codes(Path(data.codes), version)
        segments = ForecastSegments.of(codes)
        first, stop = segments.since(times.from_ms), segments.since(times.until_ms)
        if first == stop:
            last = f"the last one at {time_text(int(segments.contexts.as_of_ms[-1]), timezone)}" if first else "none"
            raise UserError(
                f"{data.codes}: no segment of a known author became known from {time_text(times.from_ms, timezone)} to "
                f"follow.until = {follow.until!r} ({last}), so there is nothing to forecast"
            )
        until_ms = int(segments.contexts.as_of_ms[stop - 1]) + 1
        rows = make_rows(codes, data.target)
        tick_ms = 1000 * follow.tick_seconds
        return FollowData(
            version,
            rows,
            DatasetEntry(path=data.codes, fingerprint=fingerprint(codes, TimeRange(0, until_ms))),
            codes,
            segments,
            first,
            stop,
            until_ms,
            FollowSchedule(segments.contexts, rows, first, stop, times.from_ms, tick_ms, config.train.batch_size),
            timezone,
            trained,
        )

    def log(self, runs: int) -> None:
        """Log the numbers of segments, and what is special about some of them."""
        known_ms = self.segments.contexts.as_of_ms
        first, last = (time_text(int(known_ms[at]), self.timezone) for at in (self.first, self.stop - 1))
        logger.info(
            f"{self.entry.path}: {self.stop - self.first:,} segments with codes of {self.version.name} to forecast, "
            f"from {first} to {last}; {self.schedule.steps:,} steps"
        )
        counts = self.counts(runs)
        logger.info(
            f"with fewer than {runs} runs: {counts['short_contexts']:,}; without a forecast: {counts['earlier']:,} "
            f"earlier segments, {counts['without_author']:,} without an author"
        )
        if not self.schedule.steps:
            logger.warning(f"{self.entry.path}: has fewer targets than train.batch_size; nothing is trained")

    def counts(self, runs: int) -> dict[str, int]:
        """Return the numbers of segments, for ``metrics.json``."""
        found = self.segments.contexts.run_counts(np.arange(self.first, self.stop))
        return {
            "forecast": self.stop - self.first,
            "earlier": self.first,
            "later": len(self.segments) - self.stop,
            "without_author": self.segments.without_author,
            "short_contexts": int((found < runs).sum()),
        }

    def origins(self, config: ForesightConfig, directory: Path) -> dict[str, Origin]:
        """Return the origins of a run's tables, which do not change when later segments are added."""
        assert config.follow is not None
        follow = config.follow.model_dump(mode="json", exclude={"until", "init_from", "pooling"})
        settings = {
            **{"seed": config.run.seed, "model": config.model.model_dump(), "follow": follow},
            **{"optimizer": config.optimizer.model_dump(), "codebook": self.version.name},
            "train": config.train.model_dump(
                include={"batch_size", "sampled_codes", "sampling_power", "without_context"}
            ),
            "data": config.data.model_dump(include={"target", "runs"}),
            "init_from": self.trained.hash if self.trained else "",
        }
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        return forecast_origins(self.version, directory.resolve().name, digest, config.follow.pooling)


def _open_trained(config: ForesightConfig, version: str) -> TrainedPredictor:
    """Open the run that a job starts from.

    Raises:
        UserError: it cannot be used, or its predictor is another one than that of the job.
    """
    assert config.follow is not None
    place = config.follow.init_from
    trained = TrainedPredictor.open(Path(place))
    if trained.version.name != version:
        raise UserError(
            f"follow.init_from = {place!r}: is of the codebook version {trained.version.name}, data.codebook is "
            f"{version}"
        )
    then, now = (
        flat_settings({"model": of.model.model_dump(), "data": of.data.model_dump(include={"target", "runs"})})
        for of in (trained.config, config)
    )
    if changes := differences(then, now, ()):
        raise UserError(f"follow.init_from = {place!r}: its predictor is another one ({'; '.join(changes)})")
    return trained


class FollowCheckpoints(StepCheckpoints):
    """Checkpoint store of a job.

    Args:
        directory: directory of the checkpoints, on a file system that all ranks share; created if it does not exist.
        config: the job.
        data: its data.
        world: ranks of the run.
    """

    def __init__(self, directory: Path, config: ForesightConfig, data: FollowData, world: World) -> None:
        facts = {
            "codebook": data.version.name,
            "init_from": data.trained.hash if data.trained else "",
            "until_ms": str(data.until_ms),
        }
        super().__init__(
            directory,
            config.checkpoint,
            StepIdentity(FORESIGHT, config, config.run.seed, facts, data.entry, "dense"),
            world,
        )
        self._data = data

    def _refuse_other(self, directory: Path, manifest: Manifest, job: Mapping[str, Any]) -> None:
        data, facts = self._data, self._identity.facts
        if manifest.kind != FORESIGHT or "until_ms" not in job:
            raise UserError(f"{directory}: no checkpoint of `limelight foresight follow`; choose another run.directory")
        if job.get("codebook") != facts["codebook"]:
            raise UserError(
                f"{directory}: trained on codes of the codebook version {job.get('codebook')!a:.120}, "
                f"{data.entry.path} has codes of {facts['codebook']}; choose another run.directory"
            )
        if job.get("init_from") != facts["init_from"]:
            raise UserError(f"{directory}: started from another predictor than that of follow.init_from now")
        until_ms = int(job["until_ms"]) if str(job["until_ms"]).isdecimal() else 0
        if until_ms > data.until_ms:
            raise UserError(
                f"{directory}: has followed the segments up to {time_text(until_ms, data.timezone)}; a run goes on to "
                "later ones only, so choose another run.directory"
            )
        if fingerprint(data.file, TimeRange(0, until_ms)) != manifest.dataset.fingerprint:
            raise UserError(
                f"{directory}: the segments of {data.entry.path} before {time_text(until_ms, data.timezone)} have "
                "changed; later ones may be added, else choose another run.directory"
            )


def start_state(
    data: FollowData, engine: PredictorEngine, checkpoints: FollowCheckpoints, world: World
) -> ForesightState:
    """Load the newest checkpoint of a run, or else the predictor that the job starts from; returns the progress."""
    schedule = data.schedule
    state = StepState(schedule.steps, data.schedule.steps * len(schedule.step(0)), ForesightWindow())
    if not checkpoints.restore(engine, state) and data.trained is not None:
        engine.load(data.trained.checkpoint / MODEL, read_manifest(data.trained.checkpoint).step, world.control)
    # Later segments may have been added to those of a finished run.
    state.finished = state.finished and state.step >= schedule.steps
    return state


class RunForecasts:
    """Forecasts of a run: on disk while it lasts, and as tables at its end.

    Args:
        directory: directory of the run.
        config: the job.
        data: its data.
        engine: engine of the predictor.
        step: steps that are done: forecasts that belong to earlier ones are there.
        world: ranks of the job.

    Raises:
        UserError: earlier forecasts are missing, or the disk cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        config: ForesightConfig,
        data: FollowData,
        engine: PredictorEngine,
        step: int,
        world: World,
    ) -> None:
        assert config.follow is not None
        self.directory = directory / FORECASTS
        self._data, self._world = data, world
        self._widths = table_widths(engine.predictor, data.centroids)
        self._origins = data.origins(config, directory)
        self._count = data.stop - data.first
        self._forecaster = Forecaster(
            data.segments, engine.predictor, data.centroids, config.follow.pooling, world.device
        )
        world.on_first_rank(lambda: self._prepare(step))
        self._spool = ForecastSpool(self.directory, self._widths, self._count)

    def make(self, step: int) -> None:
        """Make the forecasts of the segments before a step. Each rank makes a share."""
        for begin, forecast in self._forecaster.blocks(*self._data.schedule.segments(step), self._world):
            self._spool.write(begin - self._data.first, forecast)

    def sync(self) -> None:
        """Flush what this rank has written to disk."""
        self._spool.sync()

    def finish(self) -> None:
        """Write the tables, when all forecasts are made. Collective.

        Raises:
            UserError: a forecast is missing or not finite, or a table cannot be written.
        """
        self._spool.sync()
        self._spool.close()
        self._world.barrier()

        def write() -> None:
            ids = self._data.segments.ids[self._data.first : self._data.stop]
            self._spool.write_tables(self.directory, ids, 0, self._origins)
            ForecastSpool.remove(self.directory, self._widths)

        self._world.on_first_rank(write)

    def _prepare(self, step: int) -> None:
        """Make the files, with the forecasts that an earlier start of the job has made."""
        try:
            self.directory.mkdir(exist_ok=True)
            if not step or not ForecastSpool.is_there(self.directory, self._widths):
                ForecastSpool.remove(self.directory, self._widths)
                if step:
                    self._restore(step)
            ForecastSpool.extend(self.directory, self._widths, self._count)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({failure_reason(error)})") from None

    def _restore(self, step: int) -> None:
        """Make the files from the tables of a run that had finished, for segments that were added later."""
        tmp_path = self.directory / ".restored"
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        ForecastSpool.extend(tmp_path, self._widths, self._count)
        spool = ForecastSpool(tmp_path, self._widths, self._count)
        done = self._data.schedule.segments(step)[0] - self._data.first
        ids = self._data.segments.ids[self._data.first :][:done]
        for name in self._widths:
            table = ContentVectors.open(self.directory / name)
            rows = table.lookup(ids)
            if (rows < 0).any() or table.origin != self._origins[name]:
                raise UserError(
                    f"{table.path}: is not the table of this run's earlier segments; restore it, or choose another "
                    "run.directory"
                )
            for begin in range(0, done, ForecastSpool.CHUNK_ROWS):
                part = rows[begin : begin + ForecastSpool.CHUNK_ROWS]
                spool.write(begin, {name: table.vectors[part]})
        spool.sync()
        spool.close()
        # Files are there when the last of them is.
        for file in sorted(tmp_path.iterdir()):
            os.replace(file, self.directory / file.name)
        tmp_path.rmdir()


class FollowSteps:
    """Steps of a job: the forecasts before each step, then the step.

    Args:
        steps: the optimizer steps.
        forecasts: the forecasts.
        schedule: segments and rows of each step.

    Attributes:
        slow: how often the forecasts and steps of some ticks took longer than the ticks in event time.
    """

    def __init__(self, steps: PredictorSteps, forecasts: RunForecasts, schedule: FollowSchedule) -> None:
        self._steps, self._forecasts, self._schedule = steps, forecasts, schedule
        self._begin, self._span = perf_counter(), np.inf
        self.slow = 0

    def backward(self, step: int) -> Sequence[float]:
        """Make the forecasts before a step, and return its sum of the losses."""
        span = float(self._schedule.spans[step])
        if span:
            self.lap(span)
        self._forecasts.make(step)
        return self._steps.backward(step)

    def update(self, sums: Sequence[float]) -> StepDone:
        """Update the predictor."""
        return self._steps.update(sums)

    def record(self) -> None:
        """Append a record of the metric history."""
        self._steps.record()

    def save(self, *, wait: bool) -> None:
        """Save a checkpoint, after the forecasts before it are on disk."""
        self._forecasts.sync()
        self._steps.save(wait=wait)

    def lap(self, span: float) -> None:
        """Count the ticks that are done if they took too long; the next ones last ``span`` seconds of event time."""
        now = perf_counter()
        if now - self._begin > self._span:
            self.slow += 1
            if self.slow == 1:
                logger.warning(
                    f"{now - self._begin:.1f} s for {self._span:g} s of event time: this job is slower than the "
                    "segments of a live system arrive; follow.tick_seconds and train.batch_size may be larger"
                )
        self._begin, self._span = now, span


def follow(
    engine: PredictorEngine,
    data: FollowData,
    state: ForesightState,
    checkpoints: FollowCheckpoints,
    forecasts: RunForecasts,
    *,
    config: ForesightConfig,
    world: World,
    preemption: Preemption,
) -> int:
    """Run the remaining steps, each after the forecasts before it, and write the tables.

    Args:
        engine: engine of the predictor.
        data: the segments and rows.
        state: progress; updated in place.
        checkpoints: checkpoint store.
        forecasts: the forecasts.
        config: the job.
        world: ranks of the job.
        preemption: stop request of this process.

    Returns:
        How often ticks took longer than their event time, since the start of this process.

    Raises:
        UserError: the loss is not finite, or something cannot be written.
        Preempted: a rank was asked to stop; the state is saved.
    """
    settings, schedule = config.follow, data.schedule
    assert settings is not None

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / max(1, settings.warmup_steps))

    def counts(step: int) -> np.ndarray:
        # Those that were known, since later ones would tell what comes.
        return np.bincount(data.rows.target[schedule.targets_before(step)], minlength=data.codes)

    steps = FollowSteps(
        PredictorSteps(engine, data.rows, schedule, state, checkpoints, config, world, rate=rate, counts=counts),
        forecasts,
        schedule,
    )
    if not state.finished:
        run_steps(
            steps,
            state,
            checkpoints,
            title="follow",
            unit="rows",
            model="predictor",
            log_every=config.train.log_every,
            watchdog_seconds=config.train.watchdog_seconds,
            world=world,
            preemption=preemption,
        )
        steps.lap(0.0)
    forecasts.make(schedule.steps)
    forecasts.finish()
    return steps.slow


def metrics_document(
    config: ForesightConfig, data: FollowData, state: ForesightState, slow: int, stalls: Sequence[float]
) -> dict[str, Any]:
    """Return the content of ``metrics.json``.

    Args:
        config: the job.
        data: its data.
        state: progress at the end.
        slow: result of :func:`follow`.
        stalls: seconds of each save since the job's last start.
    """
    seconds = sum(entry["seconds"] for entry in state.metric_history)
    rows = sum(entry["rows"] for entry in state.metric_history)
    return {
        "codebook": data.version.name,
        "codes": data.codes,
        "target": config.data.target,
        "segments": data.counts(config.data.runs),
        "training": {
            "steps": state.step,
            "loss": [entry["loss"] for entry in state.metric_history],
            "rows_per_second": rows / seconds if seconds else None,
            "slow_ticks": slow,
            "checkpoint_stalls_seconds": list(stalls),
        },
    }
