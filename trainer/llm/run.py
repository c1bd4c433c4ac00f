"""The directory that a fine-tuning run writes::

config.json        the resolved job
deepspeed.json     DeepSpeed's own settings, as they were at the start
environment.json   of every start: versions, machine, command line
lock               held while a job runs here
base/              the small model, where the job names none
tokens/            the samples as tokens, with what was counted; made once
checkpoints/       adapter, optimizer and the state of training (trainer/checkpoint/manifest.py)
logs/              what each rank said
adapter/           the end of training in peft's own format
metrics.json       the table of the end; a run with one has finished
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

from trainer.checkpoint.run_directory import CHANGEABLE_DEEPSPEED
from trainer.config.diff import differences, flat_settings
from trainer.config.finetune import FinetuneConfig
from trainer.config.load import load_deepspeed
from trainer.config.toml import validate
from trainer.console.errors import UserError
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json
from trainer.runtime.run_lock import is_locked

CHANGEABLE = (
    "run.name",
    "run.directory",
    "data.evaluate",
    "model.path",
    "model.tokenizer",
    "train.deepspeed",
    "train.device",
    "train.log_every",
    "train.watchdog_seconds",
    "checkpoint",
    "resume",
)
"""Settings that a run may go on with changed: they change neither what is learnt nor from what. The base model is
compared by its fingerprint, and the samples are in the run as tokens."""


def choose_directory(config: FinetuneConfig) -> Path:
    """``run.directory``; or that of the newest unfinished run of the same job, which nobody else is running; or a
    fresh one under ``runs/``."""
    if config.run.directory:
        return Path(config.run.directory)
    runs = Path("runs")
    if config.resume.enabled:
        for directory in sorted(runs.glob(f"{config.run.name}-*"), reverse=True):
            if (
                not (directory / "metrics.json").exists()
                and _is_same_job(directory, config)
                and not is_locked(directory)
            ):
                return directory
    return runs / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def begin_run(directory: Path, config: FinetuneConfig, world: int) -> None:
    """Write down the job and the environment in a directory that is there, or go on in it. One rank calls it.

    Raises:
        UserError: a run of another job is there, or one at all where ``resume.enabled`` is false; or the directory
            cannot be written.
    """
    try:
        starts = []
        if (directory / "config.json").exists():
            if not config.resume.enabled:
                raise UserError(
                    f"{directory}: a run is already here, and resume.enabled = false; choose another run.directory"
                )
            if changes := _changes(directory, config):
                raise UserError(
                    f"{directory}: this run began with other settings ({'; '.join(changes)}); choose another "
                    "run.directory for a new run"
                )
            starts = json.loads((directory / "environment.json").read_text())["starts"]
        write_json(directory / "deepspeed.json", load_deepspeed(config.train.deepspeed))
        start = {"command": sys.argv, "host": platform.node(), **environment(world)}
        write_json(directory / "environment.json", {"starts": [*starts, start]})
        write_json(directory / "config.json", config.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"run.directory = {str(directory)!r}: cannot be written ({error.strerror})") from None


def load_run(directory: Path) -> FinetuneConfig:
    """The resolved job of a fine-tuning run.

    Raises:
        UserError: no run there, or one of another kind.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: no run here (config.json is missing)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if "lora" not in raw:
        raise UserError(f"{directory}: not a run of limelight finetune")
    return validate(FinetuneConfig, raw, str(path))


def base_path(config: FinetuneConfig, directory: Path) -> str:
    """Directory or hub id of the model that a run adapts."""
    return config.model.path or str(directory / "base")


def _is_same_job(directory: Path, config: FinetuneConfig) -> bool:
    try:
        return not _changes(directory, config)
    except (OSError, ValueError, UserError):
        return False


def _changes(directory: Path, config: FinetuneConfig) -> list[str]:
    """Settings that differ from those of the run in ``directory`` and may not."""
    then, now = load_run(directory), config
    changes = differences(
        flat_settings(then.model_dump(mode="json")), flat_settings(now.model_dump(mode="json")), CHANGEABLE
    )
    deepspeed_then = flat_settings(load_deepspeed(str(directory / "deepspeed.json")))
    deepspeed_now = flat_settings(load_deepspeed(now.train.deepspeed))
    deepspeed = differences(deepspeed_then, deepspeed_now, CHANGEABLE_DEEPSPEED)
    return changes + [f"deepspeed {line}" for line in deepspeed]
