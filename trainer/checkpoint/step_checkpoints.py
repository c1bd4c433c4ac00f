"""Checkpoints of a job whose steps follow from the seed and the number of the step: it has no read position.

The model is one state that all ranks share. To save, each rank writes a share of it; to load, each rank reads what it
needs, so any number of ranks can resume. Fine-tuning and Foresight's predictor are such jobs.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch.distributed as dist
from pydantic import BaseModel

from trainer.checkpoint.manifest import JOB, MODEL, DatasetEntry, Manifest, rank_file
from trainer.checkpoint.model_index import load_tensors
from trainer.checkpoint.store import CheckpointStore, agreed
from trainer.checkpoint.writer import Save
from trainer.config.sections import CheckpointConfig
from trainer.runtime.distributed import World
from trainer.runtime.rng_state import random_states, restore_random_states, start_random_states
from trainer.runtime.stored_files import read_json_object, stored_value

logger = logging.getLogger(__name__)


class SteppedModel(Protocol):
    """Model that is saved and loaded as one state."""

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        ...

    def state(self, *, copy: bool = False) -> dict[str, Any]:
        """Return the state in blocks (``model_state.in_blocks``), if asked for as a copy in host memory. Collective."""
        ...

    def load(self, path: Path, steps: int, control: dist.ProcessGroup) -> None:
        """Load a state from a checkpoint that was written after ``steps`` steps. Collective.

        Raises:
            UserError: the checkpoint cannot be read, or belongs to another model.
        """
        ...


class Window(Protocol):
    """Sums over the steps since the last record of the metric history."""

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        ...


SumsT = TypeVar("SumsT", bound=Window)


@dataclass
class StepState(Generic[SumsT]):
    """Progress of a training.

    Attributes:
        steps_total: optimizer steps of all epochs.
        rows_total: rows of all epochs, over all ranks; the sequences of a fine-tuning.
        window: sums for the next record.
        step: optimizer steps done.
        rows_done: rows done, over all ranks.
        metric_history: records so far. Checkpoints store it under the key ``trace``.
        finished: True if all steps are done and saved.
    """

    steps_total: int
    rows_total: int
    window: SumsT
    step: int = 0
    rows_done: int = 0
    metric_history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class StepIdentity:
    """Identity of a run, which must match that of a checkpoint from which it resumes.

    Attributes:
        kind: kind of its checkpoints, see ``trainer/checkpoint/manifest.py``.
        config: the job.
        seed: of its random numbers.
        facts: key -> value of ``job.json`` that must not differ.
        data: rows that are trained on.
        group: name of the parameters in the model's state.
    """

    kind: str
    config: BaseModel
    seed: int
    facts: Mapping[str, str]
    data: DatasetEntry
    group: str


class StepCheckpoints(CheckpointStore, ABC):
    """Checkpoint store of such a job.

    Args:
        directory: directory of the checkpoints, on a file system that all ranks share; created if it does not exist.
        settings: schedule of the saves.
        identity: identity of the run.
        world: ranks of the run.
    """

    def __init__(self, directory: Path, settings: CheckpointConfig, identity: StepIdentity, world: World) -> None:
        super().__init__(directory, settings, world)
        self._identity = identity

    def save(self, model: SteppedModel, state: StepState[Any], *, wait: bool = False) -> None:
        """Save the model and the progress of training, after the previous save has finished.

        Args:
            model: the model.
            state: progress of training.
            wait: return when the checkpoint is on disk; false writes in the background if the job allows it.

        Raises:
            UserError: this or the previous save could not be written, with the reason.
        """
        self._save(lambda copy: self._snapshot(model, state, copy), wait)

    def restore(self, model: SteppedModel, state: StepState[Any]) -> bool:
        """Resume from the newest complete checkpoint. Returns False if there is no checkpoint.

        Random states are restored on the same number of ranks; on another number they are seeded again from the seed
        and the step.

        Raises:
            UserError: checkpoints exist but none is complete, or the newest one is of another model or of other data.
        """
        found = self._newest_whole()
        seed, rank, size = self._identity.seed, self._world.rank, self._world.size
        if found is None:
            start_random_states(seed, 0, rank)
            return False
        directory, manifest = found
        job = agreed(self._world, lambda: read_json_object(directory / JOB))
        self._refuse_other(directory, manifest, job)
        model.load(directory / MODEL, manifest.step, self._world.control)
        self._number = manifest.number
        state.step, state.rows_done, state.finished = manifest.step, manifest.rows_done, manifest.finished
        state.metric_history[:] = stored_value(job, directory / JOB, "trace", list)
        # The sums of the open window are the same on all ranks, so the file of rank 0 has them too.
        same = manifest.ranks == size
        saved = load_tensors(directory / rank_file(rank if same else 0))
        state.window.load_state_dict(saved["window"])
        if same:
            restore_random_states(saved["random"])
        else:
            start_random_states(seed, manifest.step, rank)
        ranks = "" if same else f", saved by {manifest.ranks} ranks, now {size}"
        logger.info(f"resuming from {directory}: step {manifest.step:,} of {state.steps_total:,}{ranks}")
        return True

    @abstractmethod
    def _refuse_other(self, directory: Path, manifest: Manifest, job: Mapping[str, Any]) -> None:
        """Compare a checkpoint with the run.

        Raises:
            UserError: it is of another model or of other data.
        """

    def _snapshot(self, model: SteppedModel, state: StepState[Any], copy: bool) -> Save:
        identity = self._identity
        values = model.state(copy=copy)
        parameters = {name: tuple(saved["parameter"].shape) for name, saved in values[identity.group].items()}
        buffers = {name: tuple(buffer.shape) for name, buffer in values.get("buffers", {}).items()}
        return Save(
            directory=self._directory,
            model=values,
            own={"random": random_states(), "window": state.window.state_dict()},
            job={
                "config": identity.config.model_dump(mode="json"),
                **identity.facts,
                "trace": list(state.metric_history),
            },
            manifest=Manifest(
                step=state.step,
                number=self._number,
                finished=state.finished,
                created=time.strftime("%FT%T%z"),
                ranks=self._world.size,
                zero_stage=model.zero_stage,
                rows_done=state.rows_done,
                rows_total=state.rows_total,
                kind=identity.kind,
                behaviours=(),
                table_optimizer="none",
                tables=(),
                dense=parameters,
                buffers=buffers,
                dataset=identity.data,
                positions={},
                files={},
            ),
            position={},
            settings=self._settings,
            rank=self._world.rank,
            group=self._group,
        )
