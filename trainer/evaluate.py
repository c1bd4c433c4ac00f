"""Evaluate a trained run on a range of time it has not seen.

    limelight evaluate RUN --data PATH --from 2022-05-04 --until 2022-05-06

The job behind ``limelight evaluate``; ``trainer/rank.py`` ends with the same functions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.manifest import MODEL, find_checkpoint, read_manifest
from trainer.checkpoint.reader import stored_search
from trainer.checkpoint.run_directory import load_run
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.console.job_arguments import add_evaluate_arguments, rank_parser
from trainer.console.progress import Progress
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.packed_batch import PackedBatch
from trainer.data.features.search_vectors import SearchSpace, stored_space
from trainer.data.format import storage
from trainer.data.format.dataset import Data
from trainer.data.format.schema import DatasetSpec, partition_of
from trainer.data.loading.batch import unpack
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import HybridEngine
from trainer.metrics.behaviour_metrics import BehaviourMetrics, Report
from trainer.ranking.report import metrics_table
from trainer.ranking.setup import build_engine, freeze_at_end_of_training, held_out_loader, split_in_time
from trainer.runtime.distributed import World, run_rank

CALIBRATION_EDGES = np.geomspace(1e-4, 1, 21)
"""Edges of the predicted probabilities between which the calibration curve takes its means."""


@dataclass(frozen=True)
class Predictions:
    """This rank's rows of a held-out range.

    Attributes:
        user_id, visit_id, request_ms: ``[rows]`` int64.
        probability: ``[rows, behaviours]`` float32.
        label, mask: ``[rows, behaviours]`` float32.
    """

    user_id: Tensor
    visit_id: Tensor
    request_ms: Tensor
    probability: Tensor
    label: Tensor
    mask: Tensor


def predict(engine: HybridEngine, loader: Loader, *, quiet: bool, label: str = "evaluate") -> Predictions:
    """Predict every row of a loader. Collective: all ranks call it, whatever they have to read."""
    parts: dict[str, list[Tensor]] = {name: [] for name in Predictions.__dataclass_fields__}
    with Progress(label, loader.rows_total, "rows", quiet=quiet) as progress:
        for batch, logits in engine.predict(iter(loader)):
            for name in ("user_id", "visit_id", "request_ms", "label", "mask"):
                parts[name].append(getattr(batch, name).cpu().clone())
            parts["probability"].append(torch.sigmoid(logits.float()).cpu())
            progress.advance(batch.rows)
    return Predictions(**{name: torch.cat(tensors) for name, tensors in parts.items()})


def evaluate(predictions: Predictions, behaviours: Sequence[str], truth: Tensor | None = None) -> Report:
    """Metrics over all ranks, with ``best_auc`` and ``best_gauc`` of the true probabilities where they are known.

    Args:
        predictions: of this rank.
        behaviours: names of the K columns.
        truth: ``[rows, K]`` true probabilities of this rank's rows, see :func:`read_truth`.
    """
    report = _metrics(predictions, predictions.probability, behaviours)
    if truth is not None:
        best = _metrics(predictions, truth, behaviours)
        for behaviour in behaviours:
            report[behaviour]["best_auc"] = best[behaviour]["auc"]
            report[behaviour]["best_gauc"] = best[behaviour]["gauc"]
    return report


def _metrics(predictions: Predictions, probability: Tensor, behaviours: Sequence[str]) -> Report:
    metrics = BehaviourMetrics(behaviours)
    metrics.update(predictions.user_id, probability, predictions.label, predictions.mask)
    return metrics.compute()


def read_truth(path: str, predictions: Predictions, behaviours: Sequence[str]) -> Tensor | None:
    """True probabilities of the rows, ``[rows, K]`` float32; None for a dataset without truth. Nothing that trains
    calls this.

    Args:
        path: the dataset.
        predictions: the rows of this rank.
        behaviours: the K columns.
    """
    spec = DatasetSpec.load(path)
    columns = ["visit_id", *(f"p_{behaviour}" for behaviour in behaviours)]
    truth = np.full((len(predictions.visit_id), len(behaviours)), np.nan, np.float32)
    home = partition_of(predictions.user_id.numpy(), spec.partitions)
    for partition in range(spec.partitions):
        file = storage.join(path, f"truth/part-{partition:05d}.parquet")
        mine = np.flatnonzero(home == partition)
        if partition and not len(mine):
            continue
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(file)), columns=columns)
        except FileNotFoundError:
            return None
        visits = table["visit_id"].to_numpy()
        order = np.argsort(visits)
        line = order[np.searchsorted(visits, predictions.visit_id.numpy()[mine], sorter=order)]
        for column, behaviour in enumerate(behaviours):
            truth[mine, column] = table[f"p_{behaviour}"].to_numpy()[line]
    return torch.from_numpy(truth)


def calibration_curve(predictions: Predictions, behaviours: Sequence[str]) -> dict[str, list[tuple[float, float, int]]]:
    """Mean predicted probability, share observed and rows between :data:`CALIBRATION_EDGES`, over all ranks."""
    bins = len(CALIBRATION_EDGES) + 1
    sums = torch.zeros(len(behaviours), 3, bins, dtype=torch.float64)
    for column in range(len(behaviours)):
        kept = predictions.mask[:, column] > 0
        predicted = predictions.probability[kept, column].double()
        place = torch.bucketize(predicted, torch.from_numpy(CALIBRATION_EDGES))
        for row, values in enumerate((predicted, predictions.label[kept, column].double(), torch.ones_like(predicted))):
            sums[column, row].index_add_(0, place, values)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {
        behaviour: [(p / n, y / n, int(n)) for p, y, n in sums[column].T.tolist() if n]
        for column, behaviour in enumerate(behaviours)
    }


def write_predictions(file: Path, predictions: Predictions, behaviours: Sequence[str], world: World) -> None:
    """Write all ranks' rows to one Parquet file: ids, time, and per behaviour ``p_B``, ``label_B``, ``mask_B``."""
    columns = {name: getattr(predictions, name).numpy() for name in ("user_id", "visit_id", "request_ms")}
    for k, behaviour in enumerate(behaviours):
        columns[f"p_{behaviour}"] = predictions.probability[:, k].numpy()
        columns[f"label_{behaviour}"] = predictions.label[:, k].to(torch.uint8).numpy()
        columns[f"mask_{behaviour}"] = predictions.mask[:, k].to(torch.uint8).numpy()
    tables = world.gather(pa.table(columns))
    if tables is not None:
        pq.write_table(pa.concat_tables(tables), file)


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, opened again."""

    config: JobConfig
    data: Data
    features: FeatureMap
    engine: HybridEngine
    space: SearchSpace | None

    def logits(self, batches: Iterable[PackedBatch]) -> Iterator[Tensor]:
        """``[rows, behaviours]`` float32 of each batch, on the CPU. Collective."""
        unpacked = (unpack(packed, self.features.layout, {}) for packed in batches)
        return (found.float().cpu() for _, found in self.engine.predict(unpacked))


def open_run(directory: str, world: World, data_path: str | None = None) -> TrainedModel:
    """Load the model of a finished run over its own dataset, or another one of the same layout.

    Raises:
        UserError: no finished run there, or a dataset that the model does not fit.
    """
    config = load_run(directory)
    data = Data.open(data_path or config.data.path, config.data.on_corrupt)
    features = FeatureMap(
        data.spec, config.features, FittedFeatures.load(Path(directory) / "features"), config.data.behaviours
    )
    engine = build_engine(config, features, config.model.kind, world)
    checkpoint = find_checkpoint(directory)
    manifest = read_manifest(checkpoint)
    if not manifest.finished and world.rank == 0:
        print(f"limelight: training has not finished; taking {checkpoint}", file=sys.stderr, flush=True)
    engine.load(checkpoint / MODEL)
    space = stored_space(stored_search(checkpoint)) if features.needs_space else None
    return TrainedModel(config, data, features, engine, space)


def with_range(config: JobConfig, data: str | None, since: str | None, until: str | None) -> JobConfig:
    """The job of a run with another dataset or held-out range; the end of training stays the run's."""
    changes = {"train_until": config.data.train_until or config.data.eval_from}
    changes |= {k: v for k, v in (("path", data), ("eval_from", since), ("eval_until", until)) if v is not None}
    if not changes.get("eval_from", config.data.eval_from):
        raise UserError("the run has no held-out range of its own; say which by --from and --until")
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``limelight evaluate`` and ``python -m trainer.evaluate``."""
    parser = rank_parser("trainer.evaluate", "Evaluate a finished run.")
    add_evaluate_arguments(parser)
    given = parser.parse_args(arguments)

    def job() -> None:
        with World.join("auto") as world:
            run = open_run(given.directory, world, given.data)
            config = with_range(run.config, given.data, given.time_from, given.time_until)
            split = split_in_time(config, run.data.spec)
            frozen = freeze_at_end_of_training(config, run.data, split)
            loader = held_out_loader(config, run.data, split, run.features, world, frozen, run.space)
            if not world.sum(loader.rows_total):
                raise UserError(
                    f"{config.data.path}: no rows in the range {config.data.eval_from} to {config.data.eval_until}"
                )
            held_out = predict(run.engine, loader, quiet=given.json or world.rank > 0)
            behaviours = run.features.behaviours
            report = evaluate(held_out, behaviours, read_truth(config.data.path, held_out, behaviours))
            if given.predictions:
                write_predictions(Path(given.predictions), held_out, behaviours, world)
            if world.rank == 0:
                document = {"behaviours": report, "model": config.model.kind}
                print(json.dumps(document, indent=1) if given.json else metrics_table({config.model.kind: report}))

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
