"""Checkpoints of a run: saved while training goes on, whole or not there, loaded by any number of ranks.

A save takes a copy of the model, and a thread writes it (``trainer.checkpoint_writer``). The threads of the ranks agree
over a process group of their own, so that training and its collectives go on meanwhile.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.checkpoint_writer import Save, clear, rank_file
from trainer.config import CheckpointConfig, JobConfig
from trainer.distributed import World
from trainer.engine import HybridEngine
from trainer.errors import UserError, is_lost_peer, one_line
from trainer.log import say
from trainer.manifest import (
    JOB,
    MODEL,
    DatasetEntry,
    Manifest,
    NewerSchema,
    TableEntry,
    check_files,
    list_checkpoints,
    read_manifest,
)
from trainer.pipeline import Ask
from trainer.random_states import random_states, restore_random_states, start_random_states
from trainer.state import list_differences
from trainer.text_table import size_text
from trainer.training_state import TrainingState

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must share with the run that goes on from it.

    Attributes:
        config: the job.
        kind: of the ranker; a baseline's differs from the job's.
        behaviours: that it predicts.
        dataset: that it reads.
    """

    config: JobConfig
    kind: str
    behaviours: tuple[str, ...]
    dataset: DatasetEntry


class Checkpoints:
    """The checkpoints of one model. Construction and all methods but :meth:`ask` are collective.

    Args:
        directory: that holds them, on a file system that all ranks share; made if it is not there.
        identity: of the run.
        world: its ranks.

    Attributes:
        stalls: seconds for which training stood still, of each save.
    """

    def __init__(self, directory: Path, identity: Identity, world: World) -> None:
        self._directory, self._identity, self._world = directory, identity, world
        self._settings: CheckpointConfig = identity.config.checkpoint
        group = dist.new_group(backend="gloo")
        assert group is not None
        self._group: dist.ProcessGroup = group
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self._number = 0
        self._asked = time.monotonic()
        self.stalls: list[float] = []
        _agreed(world, lambda: clear(directory))

    def ask(self, step: int) -> bool:
        """Whether this rank would have a checkpoint saved after a step; the first rank decides for all."""
        if self._world.rank:
            return False
        seconds, steps = 60 * self._settings.every_minutes, self._settings.every_steps
        due = bool(steps and step % steps == 0) or bool(seconds and time.monotonic() - self._asked >= seconds)
        if due:
            self._asked = time.monotonic()
        return due

    def save(self, engine: HybridEngine, state: TrainingState, *, wait: bool = False) -> None:
        """Save the model and how far its training is. The save before it is waited for.

        Args:
            engine: the model.
            state: of its training.
            wait: return when it is on disk; otherwise it is written in the background, if the job says so.

        Raises:
            UserError: this save or the one before could not be written, with the reason.
        """
        started = time.monotonic()
        self.wait()
        self._number += 1
        background = self._settings.background and not wait
        save = Save(
            directory=self._directory,
            model=engine.state(copy=background),
            own=own_state(state),
            job={"config": self._identity.config.model_dump(mode="json"), "trace": list(state.trace)},
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
        if background:
            stood = f", training stood still for {time.monotonic() - started:.2f} s"
            self._writer = threading.Thread(
                target=self._write, args=(save, started, stood), name="checkpoint", daemon=True
            )
            self._writer.start()
        else:
            self._write(save, started, "")
            self.check()
        self.stalls.append(time.monotonic() - started)

    def wait(self) -> None:
        """Wait for the save that is being written.

        Raises:
            UserError: it could not be.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def check(self) -> None:
        """End the run if a save in the background could not be written; not collective.

        Raises:
            UserError: why.
        """
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Let go of the process group."""
        self.wait()
        dist.destroy_process_group(self._group)

    def restore(self, engine: HybridEngine, state: TrainingState) -> Mapping[int, tuple[int, ...]] | None:
        """Go on from the newest whole checkpoint: fill the model and the state of its training.

        Random states go on on the same number of ranks; on another number they start anew, from the seed and the step.

        Returns:
            The read position of all partitions; None if there is no checkpoint.

        Raises:
            UserError: none of those that are there is whole; or it is of another model or dataset: what differs is
                listed.
        """
        found = self._newest_whole()
        if found is None:
            start_random_states(self._identity.config.run.seed, 0, self._world.rank)
            return None
        directory, manifest = found
        self._compare(directory, manifest, engine)
        engine.load(directory / MODEL)
        self._number = manifest.number
        job = _agreed(self._world, lambda: _read_json(directory / JOB))
        state.step, state.rows_done, state.finished = manifest.step, manifest.rows_done, manifest.finished
        state.trace[:] = job["trace"]
        self._restore_own(directory, manifest, state)
        ranks = (
            "" if manifest.ranks == self._world.size else f", saved by {manifest.ranks} ranks, now {self._world.size}"
        )
        say(f"going on from {directory}: step {manifest.step:,}, {manifest.rows_done:,} rows trained on{ranks}")
        return manifest.positions

    def _restore_own(self, directory: Path, manifest: Manifest, state: TrainingState) -> None:
        rank, size = self._world.rank, self._world.size
        # Whoever wrote them: each rank's metrics are added to exactly one of the new ranks.
        states = [
            torch.load(directory / rank_file(saved), weights_only=True) for saved in range(rank, manifest.ranks, size)
        ]
        state.progressive.load_state_dict(*(saved["progressive"] for saved in states))
        if states:
            state.window.load_state_dict(states[0]["window"])
        if manifest.ranks == size:
            restore_random_states(states[0]["random"])
        else:
            start_random_states(self._identity.config.run.seed, manifest.step, rank)

    def _newest_whole(self) -> tuple[Path, Manifest] | None:
        candidates = _agreed(self._world, lambda: list(reversed(list_checkpoints(self._directory))))
        for directory in candidates:
            problem, manifest = _agreed(self._world, partial(_try_manifest, directory))
            if manifest is not None:
                mine = sorted(manifest.files)[self._world.rank :: self._world.size]
                found = self._world.agree(self._world.gather(check_files(directory, manifest, mine))) or []
                problem = next((problems[0] for problems in found if problems), None)
                if problem is None:
                    return directory, manifest
            say(f"{directory}: damaged, going back to the one before it ({problem})")
        if candidates:
            raise UserError(
                f"{self._directory}: none of {len(candidates)} checkpoints is whole; remove them to train from the "
                "beginning"
            )
        return None

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
                "changed); resume.allow_new_data=true goes on with this one"
            )

    def _model_facts(self, engine: HybridEngine) -> dict[str, Any]:
        """What a manifest tells of the model, and the model must share with it."""
        parameters, buffers = engine.dense_shapes
        return {
            "kind": self._identity.kind,
            "behaviours": self._identity.behaviours,
            "table_optimizer": engine.table_optimizer.kind,
            "tables": tuple(TableEntry.model_validate(entry) for entry in engine.plan),
            "dense": parameters,
            "buffers": buffers,
        }

    def _write(self, save: Save, started: float, remark: str) -> None:
        try:
            directory, size = save.write()
        except UserError as error:
            self._failure = error
        except Exception as error:
            # That another rank has gone is for that rank to explain.
            lost = is_lost_peer(f"{type(error).__name__}: {error}")
            self._failure = (
                error if lost else UserError(f"{self._directory}: a checkpoint could not be written: {one_line(error)}")
            )
        else:
            say(f"saved {directory}: {size_text(size)} in {time.monotonic() - started:.1f} s{remark}")


def ask_of(checkpoints: Checkpoints, stop: Callable[[], bool]) -> Callable[[int], Ask]:
    """What a rank asks for after a step: a save when one is due, and to stop when ``stop`` says so."""
    return lambda step: Ask(save=checkpoints.ask(step), stop=stop())


def own_state(state: TrainingState) -> dict[str, Any]:
    """What only this rank has, as tensors, numbers and strings."""
    return {
        "random": random_states(),
        "progressive": state.progressive.state_dict(),
        "window": state.window.state_dict(),
    }


def _shapes(
    tables: Sequence[TableEntry], dense: Mapping[str, tuple[int, ...]], buffers: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {**{f"table {table.table}": (table.rows, table.dim) for table in tables}, **dense, **buffers}


def _agreed(world: World, look: Callable[[], T]) -> T:
    """What the first rank sees, on every rank: file systems do not show all machines the same at once."""
    result: T | UserError | None = None
    if world.rank == 0:
        try:
            result = look()
        except UserError as error:
            result = error
    result = world.agree(result)
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[return-value]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _try_manifest(directory: Path) -> tuple[str | None, Manifest | None]:
    """The manifest of a checkpoint, or why it is no whole one.

    Raises:
        NewerSchema: a later version has written it: going back behind it would undo what that one has trained.
    """
    try:
        return None, read_manifest(directory)
    except NewerSchema:
        raise
    except UserError as error:
        return str(error), None
