"""Setup of a ranker's jobs: the split in time, the loaders, the model."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modules.ranker import RankerKind
from trainer.config.align import EngineJob
from trainer.config.deepspeed import complete_settings
from trainer.config.load import parse_time
from trainer.config.precision import dense_settings
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.features.code_inputs import OpenStore, check_codes
from trainer.data.features.content_tables import check_places
from trainer.data.features.dataset_checks import check_names
from trainer.data.features.device_places import DevicePlaces
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures, fit_features
from trainer.data.features.search_vectors import SearchSpace
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.dataset import Dataset, freeze_statistics
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.statistics import FrozenStatistics
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch_plan import partitions_of_rank
from trainer.data.loading.loader import FETCHED_AHEAD, SHARED_MEMORY, BatchFeatures, Loader
from trainer.engine.build_engine import make_engine, rows_per_rank
from trainer.engine.build_ranker import build_ranker
from trainer.engine.dense_engine import compiler_problem
from trainer.engine.history_alignment import Alignment
from trainer.engine.hybrid_engine import HybridEngine
from trainer.engine.step_loss import BehaviourLoss
from trainer.ranking.device_histories import check_device
from trainer.runtime.cores import free_cores
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

_WORKER_BYTES = 256 << 20
"""Free shared memory that one more loader process of a rank must find."""

_MINUTE_MS = 60_000


@dataclass(frozen=True)
class Split:
    """The training range and the held-out range, half-open, in milliseconds UTC.

    Attributes:
        train_from: earliest emission time of a training row.
        fit_until: features are fitted on rows whose labels were complete before this time.
        stream_from: time of the first event of a stream, not before ``fit_until``.
        train_until: the labels of all training rows were complete before this time; a stream ends here.
        eval_from: first request of the held-out range; ``None`` without evaluation.
        eval_until: end of the held-out range.
        eval_domains: domains of the held-out rows; empty for all.
    """

    train_from: int
    fit_until: int
    stream_from: int
    train_until: int
    eval_from: int | None
    eval_until: int
    eval_domains: tuple[str, ...] = ()

    @property
    def fitting(self) -> Selection:
        """Return the rows to fit features on."""
        return Selection(emit_from=self.train_from, emit_until=self.fit_until)

    @property
    def training(self) -> Selection:
        """Return the rows to train on."""
        return Selection(emit_from=self.train_from, emit_until=self.train_until)

    @property
    def held_out(self) -> Selection:
        """Return the rows to evaluate on.

        Raises:
            ValueError: there is no held-out range.
        """
        if self.eval_from is None:
            raise ValueError("this split has no held-out range")
        return Selection(request_from=self.eval_from, request_until=self.eval_until, domains=self.eval_domains)


def split_in_time(config: EngineJob, spec: DatasetSpec) -> Split:
    """Return the split that a job defines.

    Raises:
        UserError: a value is not a time, ranges are empty or overlap, or a domain has no rows.
    """
    data, stream = config.data, config.stream if isinstance(config, JobConfig) else None

    def moment(section: str, key: str, otherwise: int) -> int:
        text = getattr(getattr(config, section), key)
        return parse_time(text, spec.timezone, f"{section}.{key}") if text else otherwise

    # Labels of the last requests are complete only when their visits end, so an open end must include them.
    end = 1 << 62
    eval_from = moment("data", "eval_from", end)
    begin = fit_until = train_until = moment("data", "train_until", eval_from)
    if stream is not None:
        begin, train_until = moment("stream", "since", fit_until), moment("stream", "until", eval_from)
        if begin < fit_until:
            raise UserError(
                f"stream.since = {stream.since!r} is before data.train_until = {data.train_until!r}: features would be "
                "fitted on events that the stream has not delivered yet"
            )
        if begin >= train_until:
            raise UserError(f"stream.until = {stream.until!r} is not after the start of the stream")
    split = Split(
        train_from=moment("data", "train_from", 0),
        fit_until=fit_until,
        stream_from=begin,
        train_until=train_until,
        eval_from=eval_from if data.eval_from else None,
        eval_until=moment("data", "eval_until", end),
        eval_domains=config.data.eval_domains if isinstance(config, JobConfig) else (),
    )
    if unknown := [domain for domain in split.eval_domains if domain not in spec.candidates]:
        raise UserError(
            f"data.eval_domains names {unknown[0]!r}, which has no rows: those of {spec.name!r} are of "
            f"{' and '.join(spec.candidates)}"
        )
    if split.train_from >= split.fit_until:
        raise UserError(f"data.train_from = {data.train_from!r} is not before the end of training")
    if split.eval_from is not None:
        if split.eval_from < split.train_until:
            key, value = ("data.train_until", data.train_until) if stream is None else ("stream.until", stream.until)
            raise UserError(f"data.eval_from = {data.eval_from!r} is before {key} = {value!r}")
        if split.eval_from >= split.eval_until:
            raise UserError(f"data.eval_until = {data.eval_until!r} is not after data.eval_from = {data.eval_from!r}")
        if split.eval_from > spec.span_ms[1]:
            raise UserError(f"data.eval_from = {data.eval_from!r} is after the dataset's last request")
    return split


def fit_once(
    config: EngineJob,
    data: Dataset,
    split: Split,
    directory: Path,
    world: World,
    tables: Mapping[str, ContentVectors],
    segments: Mapping[str, DatasetSegments],
) -> FittedFeatures:
    """Fit the features on the training range, once in a run: the first rank fits them, the others read its files.

    Args:
        config: the job.
        data: the dataset.
        split: the training range.
        directory: of the fitted features.
        world: the ranks.
        tables: opened tables of pre-trained vectors.
        segments: segments of the dataset for each table of segment vectors.
    """
    if world.rank == 0 and not directory.exists():
        fitted = fit_features(data.spec, data.store, data.histories, config.features, split.fitting, tables, segments)
        tmp_path = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir(parents=True)
        fitted.save(tmp_path)
        tmp_path.rename(directory)
    world.barrier()
    return FittedFeatures.load(directory)


def training_loader(
    config: EngineJob,
    data: Dataset,
    split: Split,
    features: BatchFeatures,
    world: World,
    position: Mapping[int, Sequence[int]] | None = None,
    *,
    space: SearchSpace | None = None,
    first_step: int = 0,
    left_to: DevicePlaces | None = None,
) -> Loader:
    """Return the loader of this rank's training batches, shuffled inside time windows.

    Args:
        config: the job.
        data: the dataset.
        split: the training range.
        features: of the model.
        world: the ranks.
        position: of all partitions, to continue from; the start by default.
        space: search vectors of the histories.
        first_step: steps done up to ``position``; it selects the version of ``space`` for each batch.
        left_to: places of the histories' entries on the device that makes all searches; None if the loader makes them.
    """
    reading = _reading(config, world)
    logger.info(f"{world.placement}; loader processes for this rank: {reading['workers']}")
    return Loader(
        data.store,
        data.histories,
        features,
        selection=split.training,
        epochs=config.train.epochs,
        shuffle_ms=round(config.data.shuffle_minutes * _MINUTE_MS),
        state=position,
        space=space,
        first_step=first_step,
        left_to=left_to,
        **reading,
    )


def held_out_loader(
    config: EngineJob,
    data: Dataset,
    split: Split,
    features: BatchFeatures,
    world: World,
    frozen: FrozenStatistics | None,
    space: SearchSpace | None = None,
    left_to: DevicePlaces | None = None,
) -> Loader:
    """Return the loader of this rank's held-out batches, in stored order.

    With ``frozen`` statistics, histories too are read as of the end of training.
    """
    return Loader(
        data.store,
        data.histories,
        features,
        selection=split.held_out,
        as_of_limit_ms=None if frozen is None else split.train_until,
        frozen_statistics=frozen,
        space=space,
        left_to=left_to,
        **_reading(config, world),
    )


def _reading(config: EngineJob, world: World) -> dict[str, Any]:
    """Return the arguments that all loaders of a job share."""
    return {
        "rank": world.rank,
        "world": world.size,
        "batch_size": rows_per_rank(config, world.size),
        "seed": config.run.seed,
        "workers": loader_workers(config, world),
        "prefetch": config.data.prefetch,
        "pin_memory": world.device.type == "cuda",
    }


def loader_workers(config: EngineJob, world: World) -> int:
    """Return the number of loader processes of this rank: that of the job, or one by its cores.

    Without a number in the job it is at least 1, and at most what fits into shared memory and what the search vectors
    allow to be made ahead.
    """
    if config.data.workers is not None:
        return config.data.workers
    threads = 1 if world.device.type == "cuda" else torch.get_num_threads()
    limits = [free_cores(world.cores, threads)]
    with contextlib.suppress(OSError):
        limits.append(shutil.disk_usage(SHARED_MEMORY).free // (world.place_on_machine()[1] * _WORKER_BYTES))
    if isinstance(config, JobConfig) and (steps := config.features.search.refresh_steps):
        limits.append((steps - FETCHED_AHEAD) // config.data.prefetch)
    return max(1, min(limits))


def freeze_at_end_of_training(config: JobConfig, data: Dataset, split: Split) -> FrozenStatistics | None:
    """Return the statistics at the end of training if the job evaluates with frozen statistics, else ``None``."""
    if not config.data.frozen:
        return None
    return freeze_statistics(data, split.train_until)


def require_training_rows(config: EngineJob, rows: int) -> None:
    """Check that the training range has rows.

    Raises:
        UserError: it has none.
    """
    if not rows:
        raise UserError(f"{config.data.path}: no training rows in the range that data.train_from and train_until give")


def check_settings(
    config: JobConfig, spec: DatasetSpec, ranks: int, open_store: OpenStore | None = None
) -> dict[str, Any]:
    """Check a job against its dataset before anything is written or fitted.

    Args:
        config: the job.
        spec: description of the dataset.
        ranks: number of ranks.
        open_store: function that opens stores of recent codes; None does not check them.

    Returns:
        The job's DeepSpeed settings with the batch sizes.

    Raises:
        UserError: the batch size is not a multiple of the ranks, there are more ranks than partitions, a weight or
            exponent names a behaviour that is not predicted, a feature, history, code file or table of vectors does
            not exist, histories cannot be searched on a device, or the DeepSpeed settings cannot be read or are not
            supported.
    """
    rows = rows_per_rank(config, ranks)
    partitions_of_rank(spec.partitions, 0, ranks)
    check_names(spec, config.features, config.data.behaviours)
    check_codes(config.features.codes, open_store)
    check_places(config.features)
    check_device(config)
    predicted = config.data.behaviours or spec.behaviours
    for key, names in (("train.weights", config.train.weights), ("score.exponents", config.score.exponents)):
        for name in names:
            if name not in predicted:
                raise UserError(f"{key}: no behaviour {name!r}; the model predicts {', '.join(predicted)}")
    anchor, histories = config.alignment.anchor, list(config.features.history)
    if anchor and (anchor not in histories or len(histories) < 2):
        have = ", ".join(histories) or "none"
        raise UserError(f"alignment.anchor = {anchor!r}: must be one of two or more histories; the job has {have}")
    return complete_settings(dense_settings(config.train), rows, ranks, origin=config.train.deepspeed)


def check_machines(config: JobConfig, world: World) -> None:
    """Check on every rank what a job needs of its machine. Collective.

    Raises:
        UserError: a machine lacks it; every rank raises the same line, which names the machine.
    """
    if config.train.compile is not True:
        return
    problem = world.first_problem(compiler_problem(world.device))
    if problem is not None:
        raise UserError(problem)


def build_alignment(config: JobConfig, features: FeatureMap) -> Alignment | None:
    """Return the alignment of a job's histories, or ``None`` if the job has none."""
    wanted = config.alignment
    if not wanted.anchor:
        return None
    lookups = {lookup.name: lookup for lookup in features.lookups}
    anchor_first = sorted(features.sequences, key=lambda history: history.name != wanted.anchor)
    return Alignment(
        # Pre-trained vectors are not aligned: the loss moves rows of tables, and these are never trained.
        [[lookups[name] for name in history.keys if name in lookups] for history in anchor_first],
        wanted.weight,
        wanted.temperature,
        wanted.symmetric,
        wanted.detached,
    )


def build_engine(config: JobConfig, features: FeatureMap, kind: RankerKind, world: World) -> HybridEngine:
    """Build the model of a job: sharded tables and the dense network, with their optimizers. Collective.

    Raises:
        UserError: the engine refuses a setting, or a machine lacks what it needs, with the reason.
    """
    check_machines(config, world)
    weights = [config.train.weights.get(name, 1.0) for name in features.behaviours]
    return make_engine(
        config,
        features.tables,
        features.lookups,
        build_ranker(config, features, kind),
        BehaviourLoss(torch.tensor(weights, device=world.device), config.labels.retraction_limit),
        world,
        build_alignment(config, features),
        features.layout.content,
        config.averages,
        compiled=config.train.compile is True,
    )
