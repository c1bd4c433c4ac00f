"""The directory that a run writes: everything needed to understand it, to use the model and to do it again.

::

    config.json        the resolved job, readable by load_run
    environment.json   versions, machine, command line
    plan.json          how TorchRec laid out each table
    features/          vocabularies and standardisation, fitted on the training range
    log.txt            what the first rank printed
    tensorboard/       scalars
    model/             tables, dense network and optimizers (trainer/engine.py)
    metrics.json       the table of the end
    report.html        the pictures, self-contained
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.config import JobConfig, parse_config
from trainer.errors import UserError

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "webdataset", "numpy", "pyarrow")


def choose_directory(config: JobConfig) -> Path:
    """The run's directory: ``run.directory``, or a fresh one under ``runs/``."""
    if config.run.directory:
        return Path(config.run.directory)
    return Path("runs") / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def create_run(directory: Path, config: JobConfig, world: int) -> None:
    """Make the directory and write down the job and its environment. One rank calls it.

    Raises:
        UserError: the directory already holds a trained run, or cannot be written.
    """
    if (directory / "model").exists():
        raise UserError(f"{directory}: a run is already here; choose another run.directory or remove it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", config.model_dump(mode="json"))
        started = {"command": sys.argv, "host": platform.node(), **environment(world)}
        write_json(directory / "environment.json", started)
    except OSError as error:
        raise UserError(f"run.directory = {str(directory)!r}: cannot be written ({error.strerror})") from None


def load_run(directory: str | Path) -> JobConfig:
    """The resolved job of a finished run.

    Raises:
        UserError: no run there, or one that did not get as far as a model.
    """
    run = Path(directory)
    try:
        raw = json.loads((run / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run here (config.json is missing)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{run / 'config.json'}: not valid JSON ({error})") from None
    if not (run / "model").is_dir():
        raise UserError(f"{run}: this run has no model; it did not finish training")
    return parse_config(raw, str(run / "config.json"))


def environment(world: int) -> dict[str, Any]:
    """Versions and machine, for the record of a run or of a benchmark."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "ranks": world,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON aside and rename, so that a reader never sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)
