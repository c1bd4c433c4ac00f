"""Predictions of a ranker on a range of time, and their metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.ranker import JobConfig
from trainer.console.outputs import Output
from trainer.console.progress import Progress
from trainer.data.features.fit import ID_TABLES
from trainer.data.features.id_map import beyond_message
from trainer.data.features.missing_inputs import MissingTally
from trainer.data.format.truth_rows import PROBABILITIES, read_truth_rows
from trainer.data.loading.batch import RankingBatch
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import HybridEngine
from trainer.metrics.behaviour_metrics import BehaviourMetrics, Report
from trainer.ranking.training_state import MetricHistory
from trainer.runtime.distributed import World
from trainer.runtime.files import whole_file
from trainer.runtime.host_copy import HostCopy, one_behind
from trainer.runtime.phase_timer import PHASES

CALIBRATION_EDGES = np.geomspace(1e-4, 1, 21)
"""Bin edges of the calibration curve, as predicted probabilities."""

CalibrationCurves = dict[str, list[tuple[float, float, int]]]
"""Behaviour -> mean predicted probability, observed share and number of rows of each bin of predicted probabilities."""

_BEYOND = (*ID_TABLES, "histories")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """Predictions and labels of this rank's rows of a held-out range.

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
    """Predict every row of a loader. Collective: a rank without rows calls it too."""
    parts: dict[str, list[Tensor]] = {name: [] for name in Predictions.__dataclass_fields__}
    beyond, missing = torch.zeros(len(_BEYOND), dtype=torch.int64), MissingTally()
    with Progress(label, loader.rows_total, "rows", quiet=quiet) as progress:
        for batch, copies in one_behind(_copied(engine.predict(iter(loader)))):
            counted = iter(copies[len(parts) :])
            for name, copy in zip(parts, copies, strict=False):
                parts[name].append(copy)
            beyond += torch.tensor([batch.beyond.get(name, 0) for name in _BEYOND])
            if batch.searched_beyond is not None:
                beyond[_BEYOND.index("histories")] += next(counted)
            missing.add(batch.missing_with(next(counted, None)))
            progress.advance(batch.rows)
    dist.all_reduce(beyond, group=engine.control)
    if beyond.any() and dist.get_rank(engine.control) == 0:
        logger.info(f"{label}: {beyond_message(dict(zip(_BEYOND, beyond.tolist(), strict=True)))}")
    log_missing(label, missing, engine.control)
    return Predictions(**{name: torch.cat(tensors) for name, tensors in parts.items()})


def _copied(predictions: Iterator[tuple[RankingBatch, Tensor]]) -> Iterator[tuple[RankingBatch, HostCopy]]:
    """Yield each batch with copies of the columns of :class:`Predictions`, and of what its searches have counted."""
    for batch, logits in predictions:
        # Clones, since the memory of a batch on the host may be used for another one.
        facts = (tensor.clone() for tensor in (batch.user_id, batch.visit_id, batch.request_ms))
        labels = (tensor.clone() for tensor in (batch.label, batch.mask))
        counted = (count for count in (batch.searched_beyond, batch.searched_missing) if count is not None)
        yield batch, HostCopy([*facts, torch.sigmoid(logits.float()), *labels, *counted])


def log_missing(label: str, own: MissingTally, control: dist.ProcessGroup) -> None:
    """Log how many candidates and past visits of all ranks had no code or vector. Collective."""
    total = sum_missing(own, control)
    for message in total.messages() if dist.get_rank(control) == 0 else ():
        logger.info(f"{label}: {message}")


def sum_missing(own: MissingTally, control: dist.ProcessGroup) -> MissingTally:
    """Return the sums of all ranks. Collective."""
    # A rank without rows does not know the inputs, so the ranks exchange names and numbers.
    everyone: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(everyone, own.counts, group=control)
    return MissingTally(*everyone)


def evaluate(
    predictions: Predictions,
    behaviours: Sequence[str],
    control: dist.ProcessGroup | None,
    truth: Tensor | None = None,
) -> Report:
    """Compute metrics over all ranks, with ``best_auc`` and ``best_gauc`` of the true probabilities if they are known.

    Args:
        predictions: of this rank.
        behaviours: names of the K columns.
        control: a gloo group of all ranks; None for the rows of this process alone.
        truth: ``[rows, K]`` true probabilities of this rank's rows, see :func:`read_truth`.
    """
    report = _metrics(predictions, predictions.probability, behaviours, control)
    if truth is not None:
        best = _metrics(predictions, truth, behaviours, control)
        for behaviour in behaviours:
            report[behaviour]["best_auc"] = best[behaviour]["auc"]
            report[behaviour]["best_gauc"] = best[behaviour]["gauc"]
    return report


def _metrics(
    predictions: Predictions, probability: Tensor, behaviours: Sequence[str], control: dist.ProcessGroup | None
) -> Report:
    metrics = BehaviourMetrics(behaviours)
    metrics.update(predictions.user_id, probability, predictions.label, predictions.mask)
    return metrics.compute(control)


def read_truth(path: str, predictions: Predictions, behaviours: Sequence[str]) -> Tensor | None:
    """Read the true probabilities of the rows, ``[rows, K]`` float32; ``None`` for a dataset without truth.

    Training never calls this function.

    Args:
        path: the dataset.
        predictions: of this rank; they name the rows.
        behaviours: names of the K columns.
    """
    columns = [f"p_{behaviour}" for behaviour in behaviours]
    found = read_truth_rows(path, PROBABILITIES, predictions.user_id.numpy(), predictions.visit_id.numpy(), columns)
    if found is None:
        return None
    truth = np.stack([found[column] for column in columns], axis=1, dtype=np.float32)
    return torch.from_numpy(truth)


def calibration_curve(
    predictions: Predictions, behaviours: Sequence[str], control: dist.ProcessGroup | None
) -> CalibrationCurves:
    """Compute the calibration curve over all ranks. Collective.

    Args:
        predictions: of this rank.
        behaviours: names of the K columns.
        control: a gloo group of all ranks; None for the rows of this process alone.

    Returns:
        Behaviour -> mean predicted probability, observed share and number of rows for each non-empty bin of
        :data:`CALIBRATION_EDGES`.
    """
    bins = len(CALIBRATION_EDGES) + 1
    sums = torch.zeros(len(behaviours), 3, bins, dtype=torch.float64)
    for column in range(len(behaviours)):
        kept = predictions.mask[:, column] > 0
        predicted = predictions.probability[kept, column].double()
        place = torch.bucketize(predicted, torch.from_numpy(CALIBRATION_EDGES))
        for row, values in enumerate((predicted, predictions.label[kept, column].double(), torch.ones_like(predicted))):
            sums[column, row].index_add_(0, place, values)
    if control is not None:
        dist.all_reduce(sums, group=control)
    return {
        behaviour: [(p / n, y / n, int(n)) for p, y, n in sums[column].T.tolist() if n]
        for column, behaviour in enumerate(behaviours)
    }


def write_predictions(out: Output, predictions: Predictions, behaviours: Sequence[str], world: World) -> None:
    """Write the rows of all ranks to one Parquet file. Collective.

    Columns: ``user_id``, ``visit_id``, ``request_ms``, and for each behaviour B ``p_B``, ``label_B``, ``mask_B``.
    """
    columns = {name: getattr(predictions, name).numpy() for name in ("user_id", "visit_id", "request_ms")}
    for k, behaviour in enumerate(behaviours):
        columns[f"p_{behaviour}"] = predictions.probability[:, k].numpy()
        columns[f"label_{behaviour}"] = predictions.label[:, k].to(torch.uint8).numpy()
        columns[f"mask_{behaviour}"] = predictions.mask[:, k].to(torch.uint8).numpy()
    tables = world.gather(pa.table(columns))
    if tables is not None:
        with out.writing(quiet=True) as file, whole_file(file) as tmp_path:
            pq.write_table(pa.concat_tables(tables), tmp_path)


def metrics_document(
    config: JobConfig, kind: str, report: Report | None, history: MetricHistory, stalls: Sequence[float]
) -> dict[str, Any]:
    """Return the content of ``metrics.json``; undefined metrics are null, as are rates of a stream without a row.

    Args:
        config: the job.
        kind: network of the model.
        report: metrics of the held-out range, if there is one.
        history: metrics of the training steps.
        stalls: seconds for which each save stopped training, in the last start of the job.
    """
    return {
        "behaviours": report or {},
        "model": kind,
        "held_out": {"from": config.data.eval_from, "until": config.data.eval_until, "frozen": config.data.frozen},
        "training": training_summary(history, stalls),
    }


def training_summary(history: MetricHistory, stalls: Sequence[float]) -> dict[str, Any]:
    """Return the part of ``metrics.json`` about the training; the arguments are those of :func:`metrics_document`."""
    seconds = {phase: sum(entry[phase] for entry in history) for phase in PHASES}
    total = sum(seconds.values())
    rows = sum(entry["rows"] for entry in history)
    # An entry whose rows were all skipped has a rate of 0.
    duration = sum(entry["rows"] / entry["rows_per_second"] for entry in history if entry["rows"])
    return {
        "rows": rows,
        "skipped_rows": sum(entry["skipped_rows"] for entry in history),
        "rows_per_second": rows / duration if duration else None,
        "share_of_time": {phase: value / total if total else None for phase, value in seconds.items()},
        "checkpoint_stalls_seconds": list(stalls),
    }
