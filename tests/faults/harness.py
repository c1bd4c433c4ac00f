"""Real jobs of two ranks with faults, and the comparison of their final state with an undisturbed job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import trainer.data.simulator.write_dataset
from tests.faults.faulty_rank import DIRECTORY_VARIABLE, FAULT_VARIABLE, Fault
from tests.nursery import Nursery
from trainer.checkpoint.manifest import JOB, MODEL, Manifest, check_files, list_checkpoints, read_manifest

RANKS = 2
LIMIT_SECONDS = 600.0
"""Time limit of one start of a job, enough on a machine under load."""

WATCHDOG_SECONDS = 5
"""Limit of the watchdog, enough for a step on a machine under load."""

TIMES = {"rows_per_second", "data", "tables", "dense", "communication", "lag_events", "lag_seconds"}
"""Entries of the metric history that differ from run to run."""


@dataclass(frozen=True)
class Ending:
    """Result of one start of a job.

    Attributes:
        status: exit status of the launcher, negative for a signal.
        output: text that launcher and ranks printed.
        struck: faults that happened, as the ranks recorded them.
        seconds: from the start to the end.
    """

    status: int
    output: str
    struck: list[str]
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Error lines of the output; the last one is the cause of the end."""
        return [line for line in self.output.splitlines() if line.startswith("limelight: ")]

    @property
    def resumed_from(self) -> str | None:
        """Name of the checkpoint from which this start resumed, or None."""
        lines = [line for line in self.output.splitlines() if line.startswith("resuming from ")]
        return lines[0].split(":")[0].rpartition("/")[2].split(" ")[0] if lines else None


class Job:
    """A job that is started repeatedly until it has finished.

    Args:
        nursery: process that starts the job.
        directory: directory of all files of the job.
        world: dataset; the job gets a copy, whose files can be damaged.
        overrides: overrides of the job file.

    Attributes:
        arguments: arguments of ``limelight train``.
        starts: number of starts so far.
    """

    def __init__(self, nursery: Nursery, directory: Path, world: Path, *overrides: str) -> None:
        self.nursery, self.directory, self._world = nursery, directory, world
        self.run, self.data = directory / "run", directory / "world"
        directory.mkdir(parents=True)
        shutil.copytree(world, self.data, copy_function=os.link)
        self.starts = 0
        self.arguments = [
            "tests/faults/job.toml",
            f"data.path={self.data}",
            f"run.directory={self.run}",
            f"train.watchdog_seconds={WATCHDOG_SECONDS}",
            *overrides,
        ]

    def start(self, fault: Fault | None = None) -> Ending:
        """Start the same command again, with a fault or without one, and wait for its end."""
        self.starts += 1
        began = time.monotonic()
        for rank in range(RANKS):
            (self.directory / f"process-{rank}").unlink(missing_ok=True)
        (self.directory / "struck").unlink(missing_ok=True)
        out = self.directory / f"out-{self.starts}"
        environment = {DIRECTORY_VARIABLE: str(self.directory), FAULT_VARIABLE: json.dumps(fault)}
        process = self.nursery.start("tests.faults.faulty_rank", self.arguments, RANKS, environment, out)
        status = self._wait(process, began)
        self._wait_for_ranks()
        struck = self.directory / "struck"
        done = struck.read_text().splitlines() if struck.exists() else []
        return Ending(status, out.read_text(), done, time.monotonic() - began)

    def _wait(self, process: int, began: float) -> int:
        while (status := self.nursery.wait(process, 0.2)) is None:
            if time.monotonic() - began > LIMIT_SECONDS:
                os.killpg(process, signal.SIGKILL)
                self._kill_ranks()
                self.nursery.wait(process, 10)
                out = (self.directory / f"out-{self.starts}").read_text()
                raise AssertionError(f"the job has not ended within {LIMIT_SECONDS:.0f} s\n{out[-6000:]}")
        return status

    def _ranks(self) -> list[int]:
        files = [self.directory / f"process-{rank}" for rank in range(RANKS)]
        return [int(text) for file in files if file.exists() and (text := file.read_text())]

    def _kill_ranks(self) -> None:
        for rank in self._ranks():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)

    def _wait_for_ranks(self) -> None:
        """Wait until all ranks have ended; after a kill of the launcher the kernel ends them, with some delay."""
        until = time.monotonic() + 600
        while alive := [rank for rank in self._ranks() if _lives(rank)]:
            assert time.monotonic() < until, f"ranks {alive} outlive their launcher"
            time.sleep(0.02)

    def checkpoints(self) -> list[Path]:
        """Return the directories of the checkpoints, as paths that this process can read."""
        return list_checkpoints(self.nursery.path(self.run / "checkpoints"))

    def limit_disk(self, size: int) -> None:
        """Put the checkpoints on a file system of ``size`` bytes, or change its size."""
        (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.nursery.mount(self.run / "checkpoints", size)

    def restore_data(self) -> None:
        """Restore the files of the dataset."""
        shutil.rmtree(self.data)
        shutil.copytree(self._world, self.data, copy_function=os.link)

    def shards(self) -> list[Path]:
        """Return the files of training rows."""
        return sorted((self.data / "rows").glob("*.tar"))


def small_world(path: Path) -> Path:
    """Write a simulated dataset of a few hundred rows. Its records are small, so that a run reads many of them."""
    builder = partial(trainer.data.simulator.write_dataset.DatasetBuilder, rows_per_record=16)
    with mock.patch.object(trainer.data.simulator.write_dataset, "DatasetBuilder", builder):
        trainer.data.simulator.write_dataset.simulate(path, users=120, days=3, partitions=4, seed=5)
    return path


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def differences(found: Job, expected: Job) -> list[str]:
    """List the parts of two finished jobs that are not equal bit for bit: model, optimizers, metrics, trained rows."""
    different = state_differences(found, expected)
    rows = [trained_rows(found, rank) for rank in range(RANKS)]
    different += [
        f"rows of the steps of rank {rank}" for rank in range(RANKS) if rows[rank] != trained_rows(expected, rank)
    ]
    visits = [visit for of_rank in rows for of_step in of_rank.values() for visit in of_step]
    if len(visits) != len(set(visits)) or len(visits) != read_manifest(found.checkpoints()[-1]).rows_total:
        different.append("not every row was trained on exactly once")
    return different


def state_differences(found: Job, expected: Job) -> list[str]:
    """List the differences of the stored state, without the trained rows, which only ``faulty_rank`` records."""
    (newest, manifest), (reference, reference_manifest) = _newest(found), _newest(expected)
    different = [
        f"manifest: {name}"
        for name in ("step", "finished", "rows_done", "rows_total", "positions", "tables", "dense", "ranks")
        if getattr(manifest, name) != getattr(reference_manifest, name)
    ]
    different += _unequal("model", dict(model_of(newest)), dict(model_of(reference)))
    for rank in range(RANKS):
        name = f"rank-{rank:05d}.pt"
        different += _unequal(name, *(dict(_flat(_rank_state(directory / name))) for directory in (newest, reference)))
    different += _unequal("trace", *(dict(enumerate(_trace(directory))) for directory in (newest, reference)))
    different += _unequal("metrics", _metrics(found), _metrics(expected))
    return different


def _newest(job: Job) -> tuple[Path, Manifest]:
    directory = job.checkpoints()[-1]
    manifest = read_manifest(directory)
    problems = check_files(directory, manifest)
    assert not problems, problems
    return directory, manifest


def model_of(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a checkpoint: tables, dense network, and the state of both optimizers."""
    reader = dcp.FileSystemReader(directory / MODEL)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert len(state) == len(stored)
    with warnings.catch_warnings():
        # torch warns that no process group exists; reading in a single process is intended here.
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    yield from state.items()


def _rank_state(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, weights_only=True)
    del state["window"]["seconds"], state["window"]["elapsed"]
    return state


def _trace(directory: Path) -> list[dict[str, Any]]:
    trace = json.loads((directory / JOB).read_text())["trace"]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in trace]


def _metrics(job: Job) -> dict[str, Any]:
    document = json.loads((job.run / "metrics.json").read_text())
    kept = {name: document["training"][name] for name in ("rows", "skipped_rows")}
    return {**document["behaviours"], **kept, "model": document["model"]}


def trained_rows(job: Job, rank: int) -> dict[int, list[int]]:
    """Return by step the visits that a rank trained on, in the last execution of the step."""
    lines = (job.directory / f"rows-{rank}").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{place}]")
    else:
        yield name, value


def _unequal(what: str, found: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    different = [f"{what}: {key} only once" for key in found.keys() ^ expected.keys()]
    for key in found.keys() & expected.keys():
        one, other = found[key], expected[key]
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        if not same:
            different.append(f"{what}: {key}")
    return different
