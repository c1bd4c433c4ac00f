"""Checkpoints of a ranker: written in the background, atomic, loadable by any number of ranks.

A save copies the model, and a thread writes the copy (``trainer.checkpoint.store``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import JOB, MODEL, DatasetEntry, Manifest, TableEntry, rank_file
from trainer.checkpoint.model_index import load_tensors
from trainer.checkpoint.model_state import list_differences
from trainer.checkpoint.reader import stored_search
from trainer.checkpoint.store import CheckpointStore, agreed
from trainer.checkpoint.writer import Save
from trainer.config.align import EngineJob
from trainer.console.errors import UserError
from trainer.engine.batch_pipeline import StepRequest
from trainer.engine.hybrid_engine import HybridEngine
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.rng_state import random_states, restore_random_states, start_random_states
from trainer.runtime.stored_files import read_json_object, stored_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """The properties that a checkpoint must share with the run that resumes from it.

    Attributes:
        config: the job.
        kind: network of the ranker; for a baseline it differs from the job's.
        behaviours: predicted behaviours.
        dataset: of the run.
    """

    config: EngineJob
    kind: str
    behaviours: tuple[str, ...]
    dataset: DatasetEntry


class Checkpoints(CheckpointStore):
    """Checkpoints of a ranker.

    Args:
        directory: of the checkpoints, on a file system that all ranks share; made if it does not exist.
        identity: of the run.
        world: the ranks.
        after_save: see :class:`CheckpointStore`.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        world: World,
        after_save: Callable[[Path], None] = lambda directory: None,
    ) -> None:
        super().__init__(directory, identity.config.checkpoint, world, after_save)
        self._identity = identity

    def save(self, engine: HybridEngine, state: TrainingState, *, wait: bool = False) -> None:
        """Save the model and the state of its training, after the save before it has ended.

        Args:
            engine: the model.
            state: of its training.
            wait: return when the checkpoint is on disk; otherwise it is written in the background, if the job's
                settings allow it.

        Raises:
            UserError: this save or the one before it failed, with the reason.
        """
        self._save(lambda copy: self._snapshot(engine, state, copy), wait)

    def restore(self, engine: HybridEngine, state: TrainingState) -> Mapping[int, tuple[int, ...]] | None:
        """Load the newest complete checkpoint into the model and the state of its training.

        Random states are restored on the same number of ranks. On another number they start anew from seed and step.

        Returns:
            The read position of all partitions; ``None`` if there is no checkpoint.

        Raises:
            UserError: no checkpoint is complete, or it belongs to another model or dataset; the differences are listed.
        """
        found = self._newest_whole()
        if found is None:
            start_random_states(self._identity.config.run.seed, 0, self._world.rank)
            return None
        directory, manifest = found
        self._compare(directory, manifest, engine)
        engine.load(directory / MODEL)
        self._number = manifest.number
        job = agreed(self._world, lambda: read_json_object(directory / JOB))
        state.step, state.rows_done, state.finished = manifest.step, manifest.rows_done, manifest.finished
        state.metric_history[:] = stored_value(job, directory / JOB, "trace", list)
        self._restore_own(directory, manifest, state)
        ranks = (
            "" if manifest.ranks == self._world.size else f", saved by {manifest.ranks} ranks, now {self._world.size}"
        )
        logger.info(f"resuming from {directory}: step {manifest.step:,}, {manifest.rows_done:,} rows trained on{ranks}")
        return manifest.positions

    def _snapshot(self, engine: HybridEngine, state: TrainingState, copy: bool) -> Save:
        model = engine.state(copy=copy)
        # After the engine, which raises an error if the loss of the last step is not finite.
        state.settle()
        return Save(
            directory=self._directory,
            model=model,
            own=rank_state(state) | (search_state(state) if self._world.rank == 0 else {}),
            job={"config": self._identity.config.model_dump(mode="json"), "trace": list(state.metric_history)},
            manifest=Manifest(
                step=state.step,
                number=self._number,
                finished=state.finished,
                created=time.strftime("%FT%T%z"),
                ranks=self._world.size,
                zero_stage=engine.zero_stage,
                rows_done=state.rows_done,
                rows_total=state.rows_total,
                dataset=self._identity.dataset,
                positions={},
                files={},
                **self._model_facts(engine),
            ),
            position={partition: tuple(at) for partition, at in state.position.items()},
            settings=self._settings,
            rank=self._world.rank,
            group=self._group,
        )

    def _restore_own(self, directory: Path, manifest: Manifest, state: TrainingState) -> None:
        rank, size = self._world.rank, self._world.size
        # On another number of ranks too, the metrics of each stored rank are added on exactly one rank.
        states = [load_tensors(directory / rank_file(saved)) for saved in range(rank, manifest.ranks, size)]
        state.progressive.load_state_dict(*(saved["progressive"] for saved in states))
        if state.stream is not None:
            # The partitions of a rank may have belonged to any stored rank.
            everyone = [load_tensors(directory / rank_file(saved)) for saved in range(manifest.ranks)]
            mine = range(rank, manifest.ranks, size)
            state.stream.load_state_dicts([saved["stream"] for saved in everyone], mine)
        if state.space is not None:
            state.space.load_state_dict(stored_search(directory))
        if states:
            state.window.load_state_dict(states[0]["window"])
        if manifest.ranks == size:
            restore_random_states(states[0]["random"])
        else:
            start_random_states(self._identity.config.run.seed, manifest.step, rank)

    def _compare(self, directory: Path, manifest: Manifest, engine: HybridEngine) -> None:
        mine = self._model_facts(engine)
        for what in ("kind", "behaviours", "table_optimizer"):
            there, here = getattr(manifest, what), mine[what]
            if there != here:
                raise UserError(f"{directory}: a checkpoint of another model: {what} {there} there, {here} here")
        differences = list_differences(
            _shapes(manifest.tables, manifest.dense, manifest.buffers),
            _shapes(mine["tables"], mine["dense"], mine["buffers"]),
        )
        if differences:
            raise UserError(f"{directory}: a checkpoint of another model: {differences}")
        then, now = manifest.dataset, self._identity.dataset
        if then.fingerprint != now.fingerprint and not self._identity.config.resume.allow_new_data:
            raise UserError(
                f"{directory}: trained on another dataset ({then.path} then, {now.path} now, or its rows have "
                "changed); resume.allow_new_data=true accepts it"
            )

    def _model_facts(self, engine: HybridEngine) -> dict[str, Any]:
        """Return the entries of the manifest that describe the model."""
        parameters, buffers = engine.dense_shapes
        return {
            "kind": self._identity.kind,
            "behaviours": self._identity.behaviours,
            "table_optimizer": engine.table_optimizer.kind,
            "tables": tuple(TableEntry.model_validate(entry) for entry in engine.plan),
            "dense": parameters,
            "buffers": buffers,
        }


def step_request(checkpoints: Checkpoints, stop: Callable[[], bool]) -> Callable[[int], StepRequest]:
    """Return a function from the step to a rank's request after it: to save when one is due, to stop if ``stop()``."""
    return lambda step: StepRequest(save=checkpoints.is_due(step), stop=stop())


def rank_state(state: TrainingState) -> dict[str, Any]:
    """Return the state of this rank alone, as tensors, numbers and strings."""
    return {
        "random": random_states(),
        "progressive": state.progressive.state_dict(),
        "window": state.window.state_dict(),
        **({} if state.stream is None else {"stream": state.stream.state_dict()}),
    }


def search_state(state: TrainingState) -> dict[str, Any]:
    """Return the search vectors of the histories; they are equal on all ranks, and the first rank saves them."""
    return {} if state.space is None else {"search": state.space.state_dict()}


def _shapes(
    tables: Sequence[TableEntry], dense: Mapping[str, tuple[int, ...]], buffers: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {**{f"table {table.table}": (table.rows, table.dim) for table in tables}, **dense, **buffers}
