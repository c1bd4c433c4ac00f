"""The directory that a run writes: everything needed to go on with it, to understand it, and to use its model.

::

    config.json        the resolved job, readable by load_run
    deepspeed.json     DeepSpeed's own settings, as they were at the start
    environment.json   of every start: versions, machine, command line, dataset
    lock               held while a job runs here
    features/          vocabularies and standardisation, fitted on the training range
    checkpoints/       the model and the state of its training; the newest one is the run's model
    published/         models for scoring while a stream is trained on (trainer/serving/publish.py)
    unused_events/     events of a stream that changed no row (trainer/stream/live/unused_events.py)
    logs/              what each rank said
    tensorboard/       scalars
    plan.json          how TorchRec laid out each table
    metrics.json       the table of the end; a run with one has finished
    report.html        the pictures, self-contained
    baselines/KIND/    the same of each baseline, from checkpoints/ on
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import DatasetEntry
from trainer.config.diff import differences, flat_settings
from trainer.config.load import load_deepspeed
from trainer.config.ranker import JobConfig, parse_config
from trainer.console.errors import UserError
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json
from trainer.runtime.run_lock import is_locked

CHANGEABLE = (
    "run.name",
    "run.directory",
    "data.path",
    "data.workers",
    "data.prefetch",
    "data.on_corrupt",
    "features.user.sharding",
    "features.author.sharding",
    "features.item.sharding",
    "features.side.sharding",
    "tables.deduplicate",
    "train.deepspeed",
    "train.device",
    "train.overlap",
    "train.baselines",
    "train.log_every",
    "train.watchdog_seconds",
    "stream.path",
    "stream.speed",
    "stream.brokers",
    "stream.properties",
    "stream.dead_letter",
    "stream.on_gap",
    "stream.until",
    "stream.until_end",
    "stream.retry_seconds",
    "stream.future_hours",
    "stream.batch_events",
    "stream.linger_seconds",
    "stream.idle_seconds",
    "stream.queue_batches",
    "stream.buffer_events",
    "stream.publish_minutes",
    "stream.keep_published",
    "checkpoint",
    "resume",
    "score",
)
"""Settings that a run may go on with changed: they change neither what is learnt nor from what. DeepSpeed's are
compared by themselves, and the dataset by its fingerprint."""

CHANGEABLE_DEEPSPEED = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu")


def choose_directory(config: JobConfig) -> Path:
    """The run's directory: ``run.directory``; or that of the newest unfinished run of the same job, which nobody else
    is running; or a fresh one under ``runs/``."""
    if config.run.directory:
        return Path(config.run.directory)
    runs = Path("runs")
    if config.resume.enabled:
        for directory in sorted(runs.glob(f"{config.run.name}-*"), reverse=True):
            if _is_same_job(directory, config) and not is_finished(directory, config) and not is_locked(directory):
                return directory
    return runs / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def begin_run(directory: Path, config: JobConfig, world: int, dataset: DatasetEntry) -> None:
    """Make a run's directory, or go on in one; write down the job and the environment. One rank calls it.

    Raises:
        UserError: a run of another job or dataset is there, or one at all where ``resume.enabled`` is false; or the
            directory cannot be written.
    """
    try:
        starts = []
        if (directory / "config.json").exists():
            _check_same(directory, config, dataset)
            starts = json.loads((directory / "environment.json").read_text())["starts"]
        write_json(directory / "deepspeed.json", load_deepspeed(config.train.deepspeed))
        start = {"command": sys.argv, "host": platform.node(), **environment(world), "dataset": dataset.model_dump()}
        write_json(directory / "environment.json", {"starts": [*starts, start]})
        write_json(directory / "config.json", config.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"run.directory = {str(directory)!r}: cannot be written ({error.strerror})") from None


def make_directory(directory: Path) -> None:
    """Make the directory of a run.

    Raises:
        UserError: it cannot be.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.directory = {str(directory)!r}: cannot be written ({error.strerror})") from None


def homes(directory: Path, config: JobConfig) -> dict[Any, Path]:
    """Kind of ranker -> where its files are: that of the job, and its baselines."""
    baselines = {kind: directory / "baselines" / kind for kind in config.train.baselines}
    return {config.model.kind: directory, **{kind: at for kind, at in baselines.items() if kind != config.model.kind}}


def is_finished(directory: Path, config: JobConfig) -> bool:
    """Whether every model of a job has been trained and evaluated."""
    return all((home / "metrics.json").exists() for home in homes(directory, config).values())


def load_run(directory: str | Path) -> JobConfig:
    """The resolved job of a run, with the DeepSpeed settings that it has kept.

    Raises:
        UserError: no run there.
    """
    run = Path(directory)
    try:
        raw = json.loads((run / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run here (config.json is missing)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{run / 'config.json'}: not valid JSON ({error})") from None
    config = parse_config(raw, str(run / "config.json"))
    deepspeed = config.train.model_copy(update={"deepspeed": str(run / "deepspeed.json")})
    return config.model_copy(update={"train": deepspeed})


def _is_same_job(directory: Path, config: JobConfig) -> bool:
    try:
        return not _changes(directory, config)
    except (OSError, ValueError, UserError):
        return False


def _check_same(directory: Path, config: JobConfig, dataset: DatasetEntry) -> None:
    if not config.resume.enabled:
        raise UserError(
            f"{directory}: a run is already here, and resume.enabled = false; choose another run.directory or remove it"
        )
    if changes := _changes(directory, config):
        raise UserError(
            f"{directory}: this run began with other settings ({'; '.join(changes)}); choose another run.directory for "
            "a new run, which can take over tables by init_from"
        )
    started = json.loads((directory / "environment.json").read_text())["starts"][-1]["dataset"]
    if started["fingerprint"] != dataset.fingerprint and not config.resume.allow_new_data:
        raise UserError(
            f"{directory}: this run began with another dataset ({started['path']} then, {dataset.path} now, or its "
            "rows have changed); resume.allow_new_data=true goes on with this one"
        )


def _changes(directory: Path, config: JobConfig) -> list[str]:
    """Settings that differ from those of the run in ``directory`` and may not."""
    then, now = load_run(directory), config
    changes = differences(
        flat_settings(then.model_dump(mode="json")), flat_settings(now.model_dump(mode="json")), CHANGEABLE
    )
    deepspeed_then, deepspeed_now = (flat_settings(load_deepspeed(job.train.deepspeed)) for job in (then, now))
    deepspeed = differences(deepspeed_then, deepspeed_now, CHANGEABLE_DEEPSPEED)
    return changes + [f"deepspeed {line}" for line in deepspeed]
