"""Checkpoints of a fine-tuning run: the adapter and its optimizer state, atomic, for any number of ranks.

The base model is not saved. To save, the ranks gather the trained parameters and each writes a share of them. To load,
each rank reads the values that its own ZeRO stage and rank need.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import ADAPTER, JOB, MODEL, DatasetEntry, Manifest, rank_file
from trainer.checkpoint.model_index import load_tensors
from trainer.checkpoint.store import CheckpointStore, agreed
from trainer.checkpoint.writer import Save
from trainer.config.finetune import FinetuneConfig
from trainer.console.errors import UserError
from trainer.llm.finetuning.adapter_engine import AdapterEngine
from trainer.llm.finetuning.training_state import FinetuneState
from trainer.runtime.distributed import World
from trainer.runtime.rng_state import random_states, restore_random_states, start_random_states
from trainer.runtime.stored_files import read_json_object, stored_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterIdentity:
    """Identity of a run; base model and samples must match those of a checkpoint that the run resumes from.

    Attributes:
        config: the job.
        base: fingerprint of the base model.
        samples: paths and fingerprint of the tokenised training samples.
    """

    config: FinetuneConfig
    base: str
    samples: DatasetEntry


class AdapterCheckpoints(CheckpointStore):
    """Checkpoint store of an adapter.

    Args:
        directory: directory of the checkpoints, on a file system that all ranks share; created if it does not exist.
        identity: identity of the run.
        world: ranks of the run.
    """

    def __init__(self, directory: Path, identity: AdapterIdentity, world: World) -> None:
        super().__init__(directory, identity.config.checkpoint, world)
        self._identity = identity

    def save(self, engine: AdapterEngine, state: FinetuneState, *, wait: bool = False) -> None:
        """Save the adapter and the progress of training, after the previous save has finished.

        Args:
            engine: engine that holds the adapter.
            state: progress of training.
            wait: return when the checkpoint is on disk; false writes in the background if the job allows it.

        Raises:
            UserError: this or the previous save could not be written, with the reason.
        """
        self._save(lambda copy: self._snapshot(engine, state, copy), wait)

    def restore(self, engine: AdapterEngine, state: FinetuneState) -> bool:
        """Resume from the newest complete checkpoint. Returns False if there is no checkpoint.

        Random states are restored on the same number of ranks; on another number they are seeded again from the seed
        and the step.

        Raises:
            UserError: checkpoints exist but none is complete, or the newest one is of another adapter, base model or
                set of samples.
        """
        found = self._newest_whole()
        seed, rank, size = self._identity.config.run.seed, self._world.rank, self._world.size
        if found is None:
            start_random_states(seed, 0, rank)
            return False
        directory, manifest = found
        job = agreed(self._world, lambda: read_json_object(directory / JOB))
        if manifest.kind != ADAPTER or job.get("base") != self._identity.base:
            raise UserError(
                f"{directory}: this checkpoint is of an adapter for another base model; choose another run.directory"
            )
        if manifest.dataset.fingerprint != self._identity.samples.fingerprint:
            raise UserError(
                f"{directory}: this checkpoint was trained on other samples than {self._identity.samples.path}; choose "
                "another run.directory"
            )
        engine.load(directory / MODEL, manifest.step, self._world.control)
        self._number = manifest.number
        state.step, state.sequences_done = manifest.step, manifest.rows_done
        state.finished = manifest.finished
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

    def _snapshot(self, engine: AdapterEngine, state: FinetuneState, copy: bool) -> Save:
        model = engine.state(copy=copy)
        job: dict[str, Any] = {
            "config": self._identity.config.model_dump(mode="json"),
            "base": self._identity.base,
            "trace": list(state.metric_history),
        }
        return Save(
            directory=self._directory,
            model=model,
            own={"random": random_states(), "window": state.window.state_dict()},
            job=job,
            manifest=Manifest(
                step=state.step,
                number=self._number,
                finished=state.finished,
                created=time.strftime("%FT%T%z"),
                ranks=self._world.size,
                zero_stage=engine.zero_stage,
                rows_done=state.sequences_done,
                rows_total=state.sequences_total,
                kind=ADAPTER,
                behaviours=(),
                table_optimizer="none",
                tables=(),
                dense={name: tuple(saved["parameter"].shape) for name, saved in model["adapter"].items()},
                buffers={},
                dataset=self._identity.samples,
                positions={},
                files={},
            ),
            position={},
            settings=self._settings,
            rank=self._world.rank,
            group=self._group,
        )
