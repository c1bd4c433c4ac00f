"""A small simulated world with segment vectors, and jobs that align its authors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.paths import ROOT
from trainer.checkpoint.manifest import MODEL, find_checkpoint
from trainer.checkpoint.reader import StoredModel
from trainer.data.simulator.write_dataset import simulate

EVAL_FROM = "2024-03-06"


def simulate_world(path: Path) -> Path:
    """Write a world of three days from 2024-03-04, of which one is held out."""
    simulate(path, users=100, days=3, partitions=4, seed=5, segment_noise=0.8, newcomers=0.4)
    return path


def job_arguments(world: Path, directory: Path, *overrides: str) -> list[str]:
    """Return job file and overrides of a small job on the CPU."""
    return [
        str(ROOT / "configs" / "align.toml"),
        f"data.path={world}",
        f"data.eval_from={EVAL_FROM}",
        f"run.directory={directory}",
        f"train.deepspeed={ROOT / 'configs' / 'deepspeed' / 'zero1.json'}",
        *("data.workers=0", "train.device=cpu", "train.batch_size=128", "train.epochs=2", "train.log_every=3"),
        *("towers.dim=8", "towers.user_layers=[16]", "towers.author_layers=[16]", "towers.gate_layers=[4]"),
        *("evaluate.recall_at=[1, 3]", "evaluate.refresh_seconds=600"),
        *overrides,
    ]


def model_of(run: Path) -> dict[str, Tensor]:
    """Return all tensors of the newest checkpoint of a run."""
    stored = StoredModel(find_checkpoint(run) / MODEL)
    return {name: tensor.read() for name, tensor in stored.tensors.items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that differ in a bit."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
