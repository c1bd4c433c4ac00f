"""The directory of a run: everything that is needed to resume it, to understand it, and to use its model.

A ranker's run holds::

    config.json        the resolved job
    deepspeed.json     DeepSpeed's own settings, as they were at the start
    environment.json   of every start: versions, machine, command line, dataset
    checksums.json     size and CRC-32 of config.json and deepspeed.json
    lock               held while a job runs here
    status.json        the state of the job: trainer/runtime/run_status.py
    failure.json       the reason of the last start's failure
    features/          id maps and standardisation, fitted on the training range
    checkpoints/       the model and the state of its training; the newest one is the run's model
    published/         models for scoring, exported while a stream trains the model
    unused_events/     events of a stream that changed no row, with the reason
    logs/              the log of each rank
    tensorboard/       scalars
    mlflow.json        the run in an MLflow file store, if run.mlflow asks for one
    plan.json          the placement of each table by TorchRec's planner
    metrics.json       the metrics at the end; a run with this file has finished
    held_out.parquet   predictions of the held-out range, of a sample of users if there are many
    attention_examples.json   past visits with the most attention, of a few held-out rows
    report.html        the report, self-contained
    baselines/KIND/    the same for each baseline, from checkpoints/ on

A run of Foresight has the same ``config.json``, ``deepspeed.json``, ``environment.json``, ``lock``, status,
``checkpoints/``, ``logs/`` and ``metrics.json``, and one of ``limelight foresight follow`` has ``tensorboard/`` and
tables of vectors in ``forecasts/``. A fine-tuning run has the files of one of ``limelight foresight`` as well, and::

    base/              the small model, if the job names no model
    tokens/            the samples as tokens, with counts; written once
    adapter/           the adapter at the end of training, in peft's own format

A run of ``limelight align`` has the files of a ranker's run but ``published/``, ``unused_events/``, the examples,
``report.html`` and ``baselines/``, and::

    content.json       the segment vectors that it was trained on
    popularity/        positives of the training range by author
    authors/           the fused author vector of each segment, at the end of training
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from trainer.checkpoint.manifest import DatasetEntry
from trainer.config.align import AlignConfig
from trainer.config.diff import changeable_keys, differences, flat_settings
from trainer.config.finetune import FinetuneConfig
from trainer.config.foresight import ForesightConfig
from trainer.config.load import load_deepspeed
from trainer.config.paths import absolute, absolute_paths
from trainer.config.precision import HybridTrainConfig, Precision, dense_settings, precision_of, resolve_precision
from trainer.config.ranker import JobConfig
from trainer.config.toml import Model, validate_stored
from trainer.console.errors import DISK_FULL, UserError, one_line
from trainer.console.outputs import local_path
from trainer.runtime.checksums import CHECKSUMS, write_checksums
from trainer.runtime.distributed import World, choose_device
from trainer.runtime.environment import computed_by, environment, rounding_differences
from trainer.runtime.files import write_json
from trainer.runtime.mlflow_store import RUN_ID, MlflowTarget
from trainer.runtime.run_lock import is_locked, locked
from trainer.runtime.run_status import FAILURE, STATUS, recorded_status
from trainer.runtime.stored_files import read_json_object, stored_value
from trainer.runtime.tracking import tracked

logger = logging.getLogger(__name__)

UNBEGUN = {"lock", "logs", STATUS, FAILURE, RUN_ID}
"""Files of a directory in which a job has written nothing of its own."""

ResumableJob = JobConfig | FinetuneConfig | AlignConfig | ForesightConfig
"""Jobs whose runs can be resumed."""

EngineJobType = TypeVar("EngineJobType", bound=JobConfig | AlignConfig)

BASELINES = "baselines"
"""Folder of a ranker's baselines in the directory of its run."""

COMPILED = ("compiled_attention", "compiled_experts")
"""Keys of a ranker's parts that are compiled or not."""

CHANGEABLE_DEEPSPEED = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu")
"""DeepSpeed's settings that may differ when a run is resumed: they do not change what is learnt."""


def choose_directory(config: ResumableJob) -> Path:
    """Choose the directory of a run.

    This is ``run.directory`` if it is set; else the newest unfinished run of the same job that no other process works
    on; else a fresh directory under ``runs/``.
    """
    if config.run.directory:
        return local_path(config.run.directory)
    runs = Path("runs")
    if config.resume.enabled:
        for directory in sorted(runs.glob(f"{config.run.name}-*"), reverse=True):
            if _is_same_job(directory, config) and not _is_finished(directory, config) and not is_locked(directory):
                return directory
    return runs / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextmanager
def run_directory(
    directory: Path, world: World | None = None, *, job: str, mlflow: MlflowTarget | None = None
) -> Iterator[None]:
    """Make the directory of a run, hold its lock, and record the status of the job. Collective.

    A directory that was made here, and in which nothing but the lock, the status and the logs was written, is removed
    when the block raises.

    Args:
        directory: of the run, or of the tables that the job writes.
        world: ranks of the job; the first one makes and locks the directory. None for a job of one process.
        job: words of the command after ``limelight``, for the status.
        mlflow: place of the run in an MLflow file store; None for no store.

    Raises:
        UserError: the directory cannot be made or locked, or the store cannot be written.
        OSError: the disk became full in the block; the error names the directory if it named no file.
    """
    first = world is None or world.rank == 0
    made = first and not directory.exists()
    if first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({error.strerror}); choose another directory") from None
    if world is not None:
        world.barrier()
    try:
        with (
            locked(directory) if first else nullcontext(),
            recorded_status(directory, job, world.rank if world else 0, world.size if world else 1),
            tracked(directory, mlflow if first else None),
        ):
            yield
    except Exception as error:
        if made and {path.name for path in directory.iterdir()} <= UNBEGUN:
            shutil.rmtree(directory, ignore_errors=True)
        # Writes of numpy, torch and TensorBoard raise errors without a name, and all that a job writes is here.
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:
            raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(directory)) from error
        raise


def warn_of_accepted(config: ResumableJob, place: Path) -> None:
    """Print a warning while a job accepts data that has changed since its first start, because nothing refuses it then.

    Args:
        config: the job.
        place: run or export, for the line.
    """
    if config.resume.allow_new_data:
        print(
            f"limelight: warning: {place}: resume.allow_new_data is true, so changes of the dataset, of tables of "
            "vectors and of code files since the first start of the run are accepted unseen",
            file=sys.stderr,
            flush=True,
        )


def begin_run(directory: Path, config: ResumableJob, world: int, dataset: DatasetEntry | None = None) -> None:
    """Write the job and the environment into a run's directory, or check that the run there may be resumed.

    One rank calls it. A resume on as many ranks is logged if its environment rounds sums otherwise.

    Args:
        directory: of the run, which exists.
        config: the job.
        world: number of ranks.
        dataset: of the job; ``None`` for fine-tuning.

    Raises:
        UserError: the directory holds a run of another job or dataset, or any run while ``resume.enabled`` is false;
            or it cannot be written.
    """
    try:
        starts = []
        if (directory / "config.json").exists():
            _check_same_job(directory, config)
            starts = _starts(directory / "environment.json")
            if dataset is not None and not config.resume.allow_new_data:
                file = directory / "environment.json"
                entry = stored_value(starts[-1], file, "dataset", dict)
                for key in ("path", "fingerprint"):
                    stored_value(entry, file, key, str)
                _check_same_dataset(directory, entry, dataset)
        if starts:
            warn_of_accepted(config, directory)
        # Removed first: a start that is killed here must not leave checksums of other settings.
        (directory / CHECKSUMS).unlink(missing_ok=True)
        write_json(directory / "deepspeed.json", dense_settings(config.train))
        start = {"command": sys.argv, "directory": os.getcwd(), "host": platform.node(), **environment(world)}
        if dataset is not None:
            start["dataset"] = dataset.model_dump()
        start |= compiled_parts(config)
        then = starts[-1] if starts else {}
        if then.get("ranks") == world and (found := rounding_differences(then, start)):
            logger.warning(
                f"{directory}: resumed with {'; '.join(found)}: sums are rounded otherwise, so the last bits can "
                "differ from those of a run that was never stopped"
            )
        write_json(directory / "environment.json", {"starts": [*starts, start]})
        write_json(directory / "config.json", absolute_paths(config).model_dump(mode="json"))
        write_checksums(directory, ("config.json", "deepspeed.json"))
    except OSError as error:
        raise UserError(f"run.directory = {str(directory)!r}: cannot be written ({one_line(error)})") from None


def compiled_parts(config: ResumableJob) -> dict[str, str]:
    """Return a phrase for what computes each part of a ranker that may be compiled, by the part's name in the record.

    Raises:
        UserError: the device of the job is not here.
    """
    if not isinstance(config, JobConfig):
        return {}
    device, model = choose_device(config.train.device, 0), config.model
    parts = {}
    if model.attention_kind == "din":
        parts["attention"] = computed_by(device, model.compiled_attention is not False)
    single = config.train.precision != "bf16"
    parts["experts"] = computed_by(device, model.compiled_experts is not False and single and not model.dropout)
    return parts


def model_dirs(directory: Path, config: JobConfig) -> dict[Any, Path]:
    """Return the directory of each model of a ranker's run, by kind: the job's own model and its baselines."""
    baselines = {kind: directory / BASELINES / kind for kind in config.train.baselines}
    return {config.model.kind: directory, **{kind: at for kind, at in baselines.items() if kind != config.model.kind}}


def settled(config: EngineJobType, directory: Path, world: World) -> EngineJobType:
    """Return a job whose paths are absolute, and whose ``auto`` values are those of the run in ``directory``.

    Without a run there, ``train.precision`` and the keys of :data:`COMPILED` are decided here. Collective.

    Args:
        config: the job as typed.
        directory: directory of the run, which may not exist yet.
        world: ranks of the job; the first one reads the run.

    Raises:
        UserError: the DeepSpeed settings, or those of the run, cannot be read.
    """

    def decide() -> tuple[Precision, dict[str, bool]]:
        if not (directory / "config.json").exists():
            return resolve_precision(config.train, world.device.type), _compiled_keys(config)
        then: JobConfig | AlignConfig
        then = load_run(directory) if isinstance(config, JobConfig) else load_align_run(directory)
        stored = _stored_precision(then, load_deepspeed(then.train.deepspeed))
        return _resumed_precision(config.train, stored), _compiled_keys(then)

    precision, compiled = world.on_first_rank(decide)
    # The run, its checkpoints and its exports mean the same in every directory; messages up to here are as typed.
    return absolute_paths(_with_compiled(with_precision(config, precision), compiled))


def load_run(directory: str | Path) -> JobConfig:
    """Read the resolved job of a ranker's run, with the DeepSpeed settings that the run keeps.

    Raises:
        UserError: no run there, or one of another kind.
    """
    run = Path(directory)
    config = _read_job(run, JobConfig, lambda raw: "towers" not in raw, "limelight train")
    deepspeed = config.train.model_copy(update={"deepspeed": str(run / "deepspeed.json")})
    return config.model_copy(update={"train": deepspeed})


def load_finetune_run(directory: Path) -> FinetuneConfig:
    """Read the resolved job of a fine-tuning run.

    Raises:
        UserError: no run there, or one of another kind.
    """
    return _read_job(directory, FinetuneConfig, lambda raw: "lora" in raw, "limelight finetune")


def load_align_run(directory: str | Path) -> AlignConfig:
    """Read the resolved job of an alignment's run, with the DeepSpeed settings that the run keeps.

    Raises:
        UserError: no run there, or one of another kind.
    """
    run = Path(directory)
    config = _read_job(run, AlignConfig, lambda raw: "towers" in raw, "limelight align")
    deepspeed = config.train.model_copy(update={"deepspeed": str(run / "deepspeed.json")})
    return config.model_copy(update={"train": deepspeed})


def load_foresight_run(directory: Path) -> ForesightConfig:
    """Read the resolved job of a run of Foresight.

    Raises:
        UserError: no run there, or one of another kind.
    """
    return _read_job(directory, ForesightConfig, lambda raw: "codes" in raw.get("data", {}), "limelight foresight")


def base_path(config: FinetuneConfig, directory: Path) -> str:
    """Return the absolute directory, or the hub id, of the model that a fine-tuning run adapts."""
    return absolute(config.model.path or str(directory / "base"))


def _read_job(
    run: Path, model: type[Model], is_kind: Callable[[dict[str, Any]], bool] = lambda raw: True, command: str = ""
) -> Model:
    path = run / "config.json"
    try:
        raw = read_json_object(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run here (config.json is missing)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not is_kind(raw):
        raise UserError(f"{run}: not a run of {command}")
    return validate_stored(model, raw, str(path))


def _starts(file: Path) -> list[Any]:
    """Return the earlier starts of a run."""
    starts = read_json_object(file).get("starts")
    if not isinstance(starts, list) or not starts or not all(isinstance(start, dict) for start in starts):
        raise UserError(f"{file}: damaged (it has no starts)")
    return starts


def _is_finished(directory: Path, config: ResumableJob) -> bool:
    """True if every model of a job has been trained and evaluated."""
    models = model_dirs(directory, config).values() if isinstance(config, JobConfig) else [directory]
    return all((model / "metrics.json").exists() for model in models)


def _is_same_job(directory: Path, config: ResumableJob) -> bool:
    try:
        return not _changes(directory, config)
    except (OSError, ValueError, UserError):
        return False


def _check_same_job(directory: Path, config: ResumableJob) -> None:
    if not config.resume.enabled:
        raise UserError(
            f"{directory}: a run is already here, and resume.enabled = false; choose another run.directory or remove it"
        )
    if changes := _changes(directory, config):
        advice = ", which can take over tables by init_from" if isinstance(config, JobConfig) else ""
        raise UserError(
            f"{directory}: this run began with other settings ({'; '.join(changes)}); choose another run.directory for "
            f"a new run{advice}"
        )


def with_precision(config: EngineJobType, precision: Precision) -> EngineJobType:
    """Return a job with another ``train.precision``."""
    return _changed(config, train=_changed(config.train, precision=precision))


def _changed(section: Model, **values: Any) -> Model:
    """Return a section with other values of some keys."""
    return section.model_copy(update=values)


def _stored_precision(then: JobConfig | AlignConfig, deepspeed: Mapping[str, Any]) -> Precision:
    """Return the precision of a run; earlier versions stored it in DeepSpeed's settings only."""
    return precision_of(deepspeed) if then.train.precision == "auto" else then.train.precision


def _resumed_precision(train: HybridTrainConfig, stored: Precision) -> Precision:
    """Return the precision of a job that resumes a run: ``auto`` is the run's own, unless the settings name another."""
    if train.precision != "auto":
        return train.precision
    settings = load_deepspeed(train.deepspeed)
    return precision_of(settings) if "bf16" in settings else stored


def _compiled_keys(job: JobConfig | AlignConfig) -> dict[str, bool]:
    """Return the keys of parts that are compiled or not; runs before a key had PyTorch's operations."""
    return {key: getattr(job.model, key) is not False for key in COMPILED} if isinstance(job, JobConfig) else {}


def _with_compiled(config: EngineJobType, keys: Mapping[str, bool]) -> EngineJobType:
    """Return a job in which the keys of parts that are compiled or not have these values where they were ``auto``."""
    if not isinstance(config, JobConfig):
        return config
    decided = {key: value for key, value in keys.items() if getattr(config.model, key) == "auto"}
    return _changed(config, model=_changed(config.model, **decided))


def _check_same_dataset(directory: Path, then: dict[str, str], now: DatasetEntry) -> None:
    if then["fingerprint"] != now.fingerprint:
        raise UserError(
            f"{directory}: this run began with another dataset ({then['path']} then, {now.path} now, or its rows have "
            "changed); resume.allow_new_data=true accepts it"
        )


def _changes(directory: Path, config: ResumableJob) -> list[str]:
    """Return the settings that differ from those of the run in ``directory`` and must not."""
    job = type(config)
    then: ResumableJob
    if isinstance(config, JobConfig):
        then = load_run(directory)
    elif isinstance(config, AlignConfig):
        then = load_align_run(directory)
    elif isinstance(config, ForesightConfig):
        then = load_foresight_run(directory)
    else:
        then = load_finetune_run(directory)
    deepspeed_then = load_deepspeed(str(directory / "deepspeed.json"))
    if isinstance(config, JobConfig | AlignConfig) and isinstance(then, JobConfig | AlignConfig):
        precision, compiled = _stored_precision(then, deepspeed_then), _compiled_keys(then)
        config = _with_compiled(with_precision(config, _resumed_precision(config.train, precision)), compiled)
        then = _with_compiled(with_precision(then, precision), compiled)
    deepspeed_now = dense_settings(config.train)
    changes = differences(
        # An earlier version stored paths as they were typed.
        flat_settings(absolute_paths(then).model_dump(mode="json")),
        flat_settings(absolute_paths(config).model_dump(mode="json")),
        tuple(changeable_keys(job)),
    )
    deepspeed = differences(flat_settings(deepspeed_then), flat_settings(deepspeed_now), CHANGEABLE_DEEPSPEED)
    return changes + [f"deepspeed {line}" for line in deepspeed]
