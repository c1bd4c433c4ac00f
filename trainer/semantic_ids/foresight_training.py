"""Training of Foresight's predictor: which rows each step takes, the steps, and their checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from modules.foresight import CodeSample, ForesightPredictor
from trainer.checkpoint.manifest import FORESIGHT, Manifest
from trainer.checkpoint.step_checkpoints import StepCheckpoints, StepIdentity, StepState
from trainer.config.deepspeed import complete_settings
from trainer.config.foresight import ForesightConfig
from trainer.config.load import load_deepspeed
from trainer.console.errors import UserError
from trainer.engine.dense_engine import DenseOptimizer
from trainer.engine.lr_schedule import learning_rate_factor
from trainer.engine.step_loop import StepDone, run_steps
from trainer.runtime.distributed import World
from trainer.runtime.host_copy import to_device
from trainer.runtime.preemption import Preemption
from trainer.runtime.rng_state import start_random_states
from trainer.runtime.tracking import tracked_run
from trainer.semantic_ids.foresight_data import CodedRows, ForesightBatch, ForesightData
from trainer.semantic_ids.foresight_engine import PredictorEngine
from trainer.semantic_ids.foresight_model import predictor_size
from trainer.semantic_ids.foresight_rows import ForesightRows


class RowSchedule:
    """Rows of every optimizer step, as a function of the rows and the seed only: each row once in an epoch.

    Args:
        rows: ``[n] int64``, rows of training.
        batch_size: rows of a step; the last step of an epoch may have fewer.
        epochs: passes over the rows.
        seed: of the order.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, epochs: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._steps = -(-len(rows) // batch_size)
        self._epoch, self._order = -1, rows
        self.steps, self.rows = epochs * self._steps, epochs * len(rows)

    def step(self, step: int) -> np.ndarray:
        """Return the rows of step number ``step``, counted from 0."""
        epoch, place = divmod(step, self._steps)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._rows)
        return self._order[place * self._batch_size : (place + 1) * self._batch_size]


class ForesightWindow:
    """Sums over the steps since the last record of the metric history; the same on all ranks except for the seconds."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._loss, self._rows = 0.0, 0

    def add(self, loss: float, rows: int) -> None:
        """Add a step: the sum of its losses, and its rows."""
        self._loss += loss
        self._rows += rows

    def entry(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Return a record of the metric history: mean loss of a row, rows, rate."""
        seconds = time.perf_counter() - self._started
        return {
            "step": step,
            "loss": self._loss / max(self._rows, 1),
            "learning_rate": learning_rate,
            "rows": self._rows,
            "seconds": seconds,
        }

    def following(self) -> ForesightWindow:
        """Return an empty window for the steps after a record."""
        return ForesightWindow()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the elapsed seconds."""
        return {"loss": self._loss, "rows": self._rows, "elapsed": time.perf_counter() - self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums and the elapsed seconds from :meth:`state_dict`."""
        self._loss, self._rows = state["loss"], state["rows"]
        self._started = time.perf_counter() - state["elapsed"]


ForesightState = StepState[ForesightWindow]


class ForesightCheckpoints(StepCheckpoints):
    """Checkpoint store of a predictor.

    Args:
        directory: directory of the checkpoints, on a file system that all ranks share; created if it does not exist.
        config: the job.
        data: its data.
        world: ranks of the run.
    """

    def __init__(self, directory: Path, config: ForesightConfig, data: ForesightData, world: World) -> None:
        facts = {"codebook": data.version.name}
        identity = StepIdentity(FORESIGHT, config, config.run.seed, facts, data.entry, "dense")
        super().__init__(directory, config.checkpoint, identity, world)
        self._allow_new_data = config.resume.allow_new_data

    def _refuse_other(self, directory: Path, manifest: Manifest, job: Mapping[str, Any]) -> None:
        if manifest.kind != FORESIGHT:
            raise UserError(f"{directory}: no checkpoint of a predictor; choose another run.directory")
        then, now = job.get("codebook"), self._identity.facts["codebook"]
        if then != now:
            raise UserError(
                f"{directory}: trained on codes of the codebook version {then!a:.120}, {self._identity.data.path} has "
                f"codes of {now}; use the codes of that version, or choose another run.directory"
            )
        if manifest.dataset.fingerprint != self._identity.data.fingerprint and not self._allow_new_data:
            raise UserError(
                f"{directory}: trained on other rows than those of {self._identity.data.path}; choose another "
                "run.directory, or set resume.allow_new_data=true"
            )


def deepspeed_settings(config: ForesightConfig, ranks: int) -> dict[str, Any]:
    """Read and check the DeepSpeed settings of a job, and fill in the batch sizes.

    Raises:
        UserError: the batch size is not divisible by ranks and micro-batches, or a setting is not supported.
    """
    rows, rest = divmod(config.train.batch_size, ranks)
    if rest:
        raise UserError(f"train.batch_size = {config.train.batch_size} is not a multiple of the {ranks} ranks")
    file = config.train.deepspeed
    return complete_settings(load_deepspeed(file), rows, ranks, origin=file)


def start_engine(
    config: ForesightConfig,
    data: CodedRows,
    settings: Mapping[str, Any],
    device: torch.device,
    counts: np.ndarray | None,
) -> PredictorEngine:
    """Make a predictor for the codes of the data, and start its engine. Collective.

    Args:
        config: the job.
        data: codebook version and rows.
        settings: settings of :func:`deepspeed_settings`.
        device: device of this rank.
        counts: ``[codes]``, targets by code, from which the biases start; None for equal ones.
    """
    optimizer = config.optimizer
    # The same seed on every rank, because the initial values must be the same on all of them.
    start_random_states(config.run.seed, 0, 0)
    bias_counts = None if counts is None else torch.from_numpy(counts)
    predictor = ForesightPredictor(predictor_size(config, data.codes), data.centroids, bias_counts)
    return PredictorEngine(
        predictor,
        DenseOptimizer(optimizer.learning_rate, optimizer.weight_decay, optimizer.betas),
        settings,
        device,
        config.train.deepspeed,
    )


def train(
    engine: PredictorEngine,
    data: ForesightData,
    schedule: RowSchedule,
    state: ForesightState,
    checkpoints: ForesightCheckpoints,
    *,
    config: ForesightConfig,
    world: World,
    preemption: Preemption,
) -> None:
    """Run the remaining optimizer steps.

    Args:
        engine: engine of the predictor.
        data: the rows.
        schedule: rows of each step.
        state: progress of training; updated in place.
        checkpoints: checkpoint store.
        config: the job.
        world: ranks of the job.
        preemption: stop request of this process.

    Raises:
        UserError: the loss is not finite, or a checkpoint cannot be written.
        Preempted: a rank was asked to stop; the state is saved.
    """
    optimizer, counts = config.optimizer, data.target_counts

    def rate(step: int) -> float:
        return learning_rate_factor(step, state.steps_total, optimizer.warmup, optimizer.decay)

    run_steps(
        PredictorSteps(
            engine, data.rows, schedule, state, checkpoints, config, world, rate=rate, counts=lambda step: counts
        ),
        state,
        checkpoints,
        title="foresight",
        unit="rows",
        model="predictor",
        log_every=config.train.log_every,
        watchdog_seconds=config.train.watchdog_seconds,
        world=world,
        preemption=preemption,
        scalars=tracked_run(),
    )


class StepRows(Protocol):
    """Rows of every optimizer step."""

    def step(self, step: int) -> np.ndarray:
        """Return the rows of step number ``step``, counted from 0."""
        ...


class PredictorSteps:
    """Optimizer steps of the predictor.

    Args:
        engine: engine of the predictor.
        rows: all rows.
        schedule: rows of each step.
        state: progress of training; updated in place.
        checkpoints: checkpoint store.
        config: the job.
        world: ranks of the job.
        rate: returns the factor on the learning rate of a step.
        counts: returns ``[codes] int64``, the targets by code by which a step draws the codes of a sampled softmax.
    """

    def __init__(
        self,
        engine: PredictorEngine,
        rows: ForesightRows,
        schedule: StepRows,
        state: ForesightState,
        checkpoints: StepCheckpoints,
        config: ForesightConfig,
        world: World,
        *,
        rate: Callable[[int], float],
        counts: Callable[[int], np.ndarray],
    ) -> None:
        self._engine, self._all_rows, self._schedule, self._state = engine, rows, schedule, state
        self._checkpoints, self._config, self._world = checkpoints, config, world
        self._rate_factor, self._counts = rate, counts
        self._rows, self._rate = 0, 0.0

    def backward(self, step: int) -> Sequence[float]:
        """Return the sum of the losses."""
        train = self._config.train
        self._rate = self._config.optimizer.learning_rate * self._rate_factor(step)
        self._engine.set_learning_rate(self._rate)
        part = self._schedule.step(step)
        # Draws of a step do not depend on the ranks, and are the same after a resume.
        hiding, sampling = np.random.SeedSequence([self._config.run.seed, step]).spawn(2)
        hidden = np.random.default_rng(hiding).random(len(part)) < train.without_context
        sample = None
        if train.sampled_codes:
            generator = torch.Generator().manual_seed(int(sampling.generate_state(1)[0]))
            frequency = code_frequency(self._counts(step), train.sampling_power)
            drawn = CodeSample.draw(frequency, train.sampled_codes, generator)
            sample = CodeSample(*(to_device(part, self._world.device) for part in drawn))
        shares = np.array_split(np.arange(len(part)), self._world.size * self._engine.parts)
        own = shares[self._world.rank * self._engine.parts :][: self._engine.parts]
        batches = [
            ForesightBatch.of(self._all_rows, part[share], self._config.data.runs, self._world.device, hidden[share])
            for share in own
        ]
        self._rows = len(part)
        return (self._engine.backward(batches, self._rows, sample),)

    def update(self, sums: Sequence[float]) -> StepDone:
        """Update the predictor."""
        self._engine.step()
        self._state.window.add(sums[0], self._rows)
        return StepDone(self._rows, sums[0] / self._rows)

    def record(self) -> dict[str, float]:
        """Append a record of the metric history. Returns its scalars."""
        entry = self._state.window.entry(self._state.step, self._rate)
        self._state.metric_history.append(entry)
        self._state.window = self._state.window.following()
        return {name: entry[name] for name in ("loss", "learning_rate")}

    def save(self, *, wait: bool) -> None:
        """Save a checkpoint."""
        self._checkpoints.save(self._engine, self._state, wait=wait)


def code_frequency(counts: np.ndarray, power: float) -> torch.Tensor:
    """Return the probabilities ``[codes] float64`` with which a sampled softmax draws codes.

    They are proportional to the frequency among the targets ``counts [codes]``, plus one so that none is 0, to a power.
    """
    weights = torch.from_numpy((counts + 1.0) ** power)
    return weights / weights.sum()
