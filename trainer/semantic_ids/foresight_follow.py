"""Forecasts and training of a predictor in the order of time: Foresight's two passes at every tick.

A tick is a range of event time. At each tick

1. every segment that became known in it gets its forecast, by the predictor after the training of the ticks before;
2. the targets that became known in it wait for a full batch. Each full batch is an optimizer step. Before it, the
   predictor and two rules foresee its targets (``foresight_progressive.py``).

So a forecast depends on the codes that were known when its segment became known, and on the targets of earlier ticks,
and on nothing else: not on the number of later segments, not on the batch it is computed in. The predictor changes only
with a step, so the segments of all ticks between two steps are computed together.

The last tick of the data is open: a later segment may still belong to it. Its targets are trained on when a segment of
a later tick is there. So a run on a part of the data, continued on all of it, gives the bits of a run on all of it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from trainer.checkpoint.manifest import FORESIGHT, MODEL, Manifest, read_manifest
from trainer.checkpoint.step_checkpoints import StepCheckpoints, StepIdentity, StepState
from trainer.config.foresight import ForesightConfig
from trainer.config.iso_time import time_text
from trainer.console.errors import UserError, failure_reason
from trainer.data.format.content_vectors import ContentVectors
from trainer.engine.step_loop import StepDone, run_steps
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption
from trainer.runtime.scalars import open_scalars
from trainer.semantic_ids.foresight_data import fingerprint
from trainer.semantic_ids.foresight_engine import PredictorEngine
from trainer.semantic_ids.foresight_follow_data import FollowData, FollowSchedule
from trainer.semantic_ids.foresight_forecast import (
    Forecaster,
    ForecastSpool,
    table_widths,
)
from trainer.semantic_ids.foresight_progressive import FollowWindow, ProgressiveQuality
from trainer.semantic_ids.foresight_training import ForesightState, PredictorSteps
from trainer.semantic_ids.segments import TimeRange

logger = logging.getLogger(__name__)

FORECASTS = "forecasts"
"""Directory of the tables in a run."""


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
    state: ForesightState = StepState(schedule.steps, data.schedule.steps * len(schedule.step(0)), FollowWindow())
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
            places = slice(self._data.first, self._data.stop)
            self._spool.write_tables(self.directory, self._data.segments, places, self._origins)
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
    """Steps of a job: the forecasts before each step, its progressive quality, then the step.

    Args:
        steps: the optimizer steps.
        forecasts: the forecasts.
        schedule: segments and rows of each step.
        quality: progressive quality.
        state: progress of training, which the steps update.

    Attributes:
        slow: how often the forecasts and steps of some ticks took longer than the ticks in event time.
    """

    def __init__(
        self,
        steps: PredictorSteps,
        forecasts: RunForecasts,
        schedule: FollowSchedule,
        quality: ProgressiveQuality,
        state: ForesightState,
    ) -> None:
        self._steps, self._forecasts, self._schedule = steps, forecasts, schedule
        self._quality, self._state = quality, state
        self._begin, self._span = perf_counter(), np.inf
        self.slow = 0

    def backward(self, step: int) -> Sequence[float]:
        """Make the forecasts before a step; returns its sum of the losses, then its progressive quality."""
        span = float(self._schedule.spans[step])
        if span:
            self.lap(span)
        self._forecasts.make(step)
        quality = self._quality.measure(step)
        return [*self._steps.backward(step), *quality]

    def update(self, sums: Sequence[float]) -> StepDone:
        """Update the predictor."""
        loss, *quality = sums
        self._quality.add(self._state.step, quality)
        return self._steps.update([loss])

    def record(self) -> dict[str, float]:
        """Append a record of the metric history. Returns its scalars."""
        scalars = self._steps.record()
        progressive = self._state.metric_history[-1]["progressive"]
        qualities = {
            f"progressive_{metric}/{name}": value
            for name, quality in progressive.items()
            for metric, value in quality.items()
        }
        return scalars | qualities

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

    scalars = None
    if world.rank == 0 and not state.finished:
        # Steps after the checkpoint are repeated, and so are their scalars.
        scalars = open_scalars(forecasts.directory.parent / "tensorboard", state.step)
    steps = FollowSteps(
        PredictorSteps(engine, data.rows, schedule, state, checkpoints, config, world, rate=rate, counts=counts),
        forecasts,
        schedule,
        ProgressiveQuality(engine, data, state, config.data.runs, world),
        state,
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
            scalars=scalars,
        )
        steps.lap(0.0)
    if scalars is not None:
        scalars.close()
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
    assert isinstance(state.window, FollowWindow)
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
        "progressive": {
            **state.window.summary(),
            "records": [
                {"step": entry["step"], "rows": entry["rows"], **entry["progressive"]}
                for entry in state.metric_history
                if "progressive" in entry
            ],
        },
    }
