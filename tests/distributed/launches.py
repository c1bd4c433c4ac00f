"""Launches of a small training job by each launcher, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.nursery import Nursery
from tests.paths import ROOT
from trainer.checkpoint.manifest import Manifest, list_checkpoints, read_manifest

SETTINGS = (
    "configs/simulated.toml",
    "data.eval_from=2024-03-06",
    "model.expert_layers=[[16], [8]]",
    "model.tower=[8]",
    "features.history.short.length=5",
    "features.history.live.length=5",
    "train.batch_size=32",
    "train.epochs=1",
    "train.log_every=5",
    "train.device=cpu",
    "checkpoint.every_steps=5",
)
ENVIRONMENT = {
    **{
        name: value
        for name, value in os.environ.items()
        if name not in ("MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    },
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # DeepSpeed compiles an optimizer on import, that nobody here uses; it takes seconds in each new process.
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LIMELIGHT = (sys.executable, "-m", "launch.cli.main")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
TIMEOUTS = 600.0


def job(world: Path, directory: Path, *overrides: str) -> list[str]:
    """Return the arguments of ``trainer.rank``."""
    return [*SETTINGS, f"data.path={world}", f"run.directory={directory}", *overrides]


def start(*command: str, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Start a command in the repository's root, in a session of its own."""
    return subprocess.Popen(
        [*prefix, *command],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


class ForkedAgent:
    """Agent of torchrun that the nursery starts, with the part of the interface of Popen that these tests use.

    Args:
        nursery: process that starts the agent.
        out: file for what the agent and its workers print.
        arguments: arguments of torchrun.
        network: process of the nursery whose network namespace the agent joins; 0 for that of the machine.
        module: module of the agent.
        environment: additional variables of the environment.
    """

    def __init__(
        self,
        nursery: Nursery,
        out: Path,
        *arguments: str,
        network: int = 0,
        module: str = "torch.distributed.run",
        **environment: str,
    ) -> None:
        self._nursery, self._out = nursery, out
        self.pid = nursery.start(module, arguments, 0, environment, out, network=network)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while the agent runs."""
        if self.returncode is None:
            self.returncode = self._nursery.wait(self.pid, 0)
        return self.returncode

    def communicate(self, timeout: float = TIMEOUTS) -> tuple[str, None]:
        """Wait for the end, and return what was printed, as Popen does."""
        if self.returncode is None:
            self.returncode = self._nursery.wait(self.pid, timeout)
        return self._out.read_text(), None


Started = subprocess.Popen[str] | ForkedAgent


def end(processes: Sequence[Started], expect: int = 0) -> list[str]:
    """Wait for all commands, and return their outputs. Another exit status than ``expect`` fails the test."""
    printed = []
    try:
        for process in processes:
            printed.append(process.communicate(timeout=TIMEOUTS)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.communicate()
    output = "\n".join(text[-8000:] for text in printed)
    assert [process.returncode for process in processes] == [expect] * len(processes), output
    return printed


def metrics(directory: Path) -> dict[str, Any]:
    """Return the metrics of a run by behaviour."""
    document: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return dict(document["behaviours"])


def last_checkpoint(directory: Path) -> Manifest:
    """Return the manifest of the newest checkpoint of a run."""
    return read_manifest(list_checkpoints(directory / "checkpoints")[-1])
