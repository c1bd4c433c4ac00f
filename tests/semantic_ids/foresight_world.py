"""A small Foresight job: a world of rooms, a codebook version, a code file, and the job's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.llm.tiny import StopAfter
from tests.paths import ROOT
from tests.semantic_ids.segment_world import assigned, make_version, write_world
from trainer.checkpoint.manifest import list_checkpoints
from trainer.checkpoint.reader import Checkpoint
from trainer.config.foresight import ForesightConfig, load_foresight
from trainer.data.format.segment_codes import CodeDigests, CodeFile, code_schema
from trainer.foresight import run_job
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted, Preemption

CODES = 12
"""Codes of the version."""


def write_foresight(directory: Path, rooms: int = 10, segments: int = 40) -> None:
    """Write ``world``, ``codebook``, the codes ``world/codes.parquet``, and the job file ``job.toml``."""
    write_world(directory / "world", rooms, segments)
    assigned(make_version(directory / "codebook", CODES), directory / "world")
    (directory / "job.toml").write_text(
        f'[run]\ndirectory = "{directory}/run"\n'
        f'[data]\npath = "{directory}/world"\ncodes = "{directory}/world/codes.parquet"\n'
        f'codebook = "{directory}/codebook"\nruns = 8\ntrain_until = "2024-03-04T00:15"\n'
        "[model]\ndim = 8\nheads = 2\nencoder_layers = 1\nfeed_forward = 16\ndropout = 0.0\n"
        "[optimizer]\nlearning_rate = 1e-2\n"
        f'[train]\nbatch_size = 32\nepochs = 2\nlog_every = 1\ndevice = "cpu"\nwatchdog_seconds = 300.0\n'
        f'deepspeed = "{ROOT}/configs/deepspeed/zero1.json"\n'
    )


def job_of(directory: Path, *overrides: str) -> ForesightConfig:
    """Read the job file."""
    return load_foresight(directory / "job.toml", overrides)


def run(directory: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """Run the job in this process, on one rank; a request to stop comes in step ``stop_after``.

    Returns:
        The content of ``metrics.json``; nothing if the job was stopped.
    """
    with World.join("cpu") as world:
        preemption = Preemption() if stop_after is None else StopAfter(stop_after)
        try:
            return run_job(job_of(directory, *overrides), world, preemption)
        except Preempted:
            assert stop_after is not None
            return {}


def write_codes(file: CodeFile, keep: np.ndarray | None = None, **columns: np.ndarray) -> None:
    """Write a code file again at its place, with some other columns, and of them the segments ``keep [n] bool``."""
    kept = slice(None) if keep is None else keep
    names = ("item_id", "author_id", "segment", "known_ms", "codes", "start_ms")
    *found, numbers, start_ms = (columns.get(name, getattr(file, name))[kept] for name in names)
    digests = CodeDigests(len(file.levels))
    digests.add(dict(zip(names, found, strict=False)), numbers, start_ms)
    schema = code_schema(file.version, file.levels)
    with pq.ParquetWriter(file.path, schema) as writer:
        writer.write_table(pa.table([*found, *numbers.T, start_ms], schema=schema))
        writer.add_key_value_metadata(digests.metadata)


def model_of(run_directory: Path) -> dict[str, torch.Tensor]:
    """Return parameters and moments of the newest checkpoint of a run."""
    checkpoint = Checkpoint.open(list_checkpoints(run_directory / "checkpoints")[-1])
    slots = checkpoint.model.dense
    return {f"{name}/{slot}": tensor.read() for name, found in slots.items() for slot, tensor in found.items()}


def without_clock(document: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a run without what depends on the clock."""
    training = {name: value for name, value in document["training"].items() if name.startswith(("steps", "loss"))}
    return document | {"training": training}


def assert_same_model(one: Path, other: Path) -> None:
    """Compare the newest checkpoints of two runs bit for bit."""
    first, second = model_of(one), model_of(other)
    assert first.keys() == second.keys() and len(first) > 20
    for name in first:
        assert np.array_equal(first[name].numpy(), second[name].numpy()), name
