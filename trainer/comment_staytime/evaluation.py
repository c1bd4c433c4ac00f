"""Training and evaluation of a staytime model: metrics, constant baselines, and the files of a run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_model

from trainer.comment_staytime.inputs import StaytimeData
from trainer.comment_staytime.model import StaytimePredictions, build_network, fit_base_on, predict, train
from trainer.config.staytime import StaytimeConfig
from trainer.console.errors import UserError, one_line
from trainer.console.text_table import text_table
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.metrics.staytime_metrics import (
    Values,
    comment_metrics,
    metrics_by_exposure,
    regression_metrics,
    released_metrics,
    staytime_metrics,
)
from trainer.runtime.files import set_usual_modes, whole_file, write_json

COLUMNS = ("rmse", "mae", "rmse_opened", "mae_opened", "bias", "xauc", "gauc", "ndcg@1", "ndcg@3", "ndcg@5", "mrr")
"""Metrics of the printed table; all of them are in metrics.json."""


def train_and_evaluate(
    config: StaytimeConfig,
    data: StaytimeData,
    device: torch.device,
    directory: Path | None = None,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a model and evaluate it on the held-out visits.

    Args:
        config: the job.
        data: data of the job, from :func:`load_staytime`.
        device: device to compute on.
        directory: directory of the run; with None nothing is written.
        quiet: show no progress bar.

    Returns:
        The metrics of :func:`evaluate`, the mean ``losses`` of each epoch, ``train_seconds``, and the number of
        ``parameters``.
    """
    # Seeds initial weights and dropout; the order of the rows has its own generator in train().
    torch.manual_seed(config.run.seed)
    base = fit_base_on(config, data)
    network = build_network(config, data, base).to(device)
    base = base.to(device)
    started = time.monotonic()
    losses = train(config, data, base, network, device, quiet=quiet)
    seconds = time.monotonic() - started
    predictions = predict(config, data, base, network, device, data.held_out)
    if directory is not None:
        write_json(directory / "fitted.json", fitted_values(data, base.facts))
        _save_network(network, directory / "model.safetensors")
        write_predictions(directory / "predictions.parquet", data, predictions)
    return {
        **evaluate(config, data, predictions),
        "losses": losses,
        "train_seconds": round(seconds, 2),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _save_network(network: torch.nn.Module, file: Path) -> None:
    """Write the weights of a network.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with whole_file(file) as tmp_path:
            save_model(network, str(tmp_path))
            set_usual_modes(tmp_path)
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be written ({one_line(error)})") from None


def evaluate(config: StaytimeConfig, data: StaytimeData, predictions: StaytimePredictions) -> dict[str, Any]:
    """Compute the metrics of predictions of the held-out visits.

    Returns:
        ``all``: metrics over all held-out visits; ``exposures``: the same in groups by the number of training visits to
        the video; ``constant``: metrics of constant predictions; ``truth``: metrics of the true expectation (simulated
        world only); ``released_definitions``: metrics as LCU's released code defines them (lcu.mode = "released" only);
        ``comments``: metrics of the two comment-ranking heads (with LCU only); ``watch``, if watch times are predicted:
        ``rmse_log``, the error of ``log(1 + seconds watched)``, and ``explained``, the predicted share of its variance.
    """
    rows = data.held_out
    user, seconds = data.user_id[rows], data.seconds[rows].astype(np.float64)
    mean = float(data.seconds[data.training].mean(dtype=np.float64))
    result: dict[str, Any] = {
        "all": staytime_metrics(user, seconds, predictions.seconds, predictions.score),
        "exposures": metrics_by_exposure(data.exposures[rows], user, seconds, predictions.seconds, predictions.score),
        "constant": {
            "zero": regression_metrics(seconds, np.zeros(len(rows))),
            "training mean": regression_metrics(seconds, np.full(len(rows), mean)),
        },
    }
    truth = read_truth(config.data.path, data.visit_id[rows])
    if truth is not None:
        result["truth"] = staytime_metrics(user, seconds, truth, truth)
    if config.lcu.mode == "released":
        result["released_definitions"] = released_metrics(user, seconds, predictions.seconds, predictions.score)
    if data.watch is not None and predictions.watch is not None:
        result["watch"] = _watch_metrics(data.watch.target[rows], predictions.watch, data.watch.scale)
    comments = data.comments
    if comments is not None and predictions.popular is not None and predictions.touched is not None:
        chosen = comments.chosen[rows]
        result["comments"] = {
            **comment_metrics(
                {"popular": predictions.popular, "touched": predictions.touched},
                {"popular": comments.popular_later[chosen], "touched": comments.touched[rows]},
                chosen >= 0,
            ),
            "share_touched": comments.share_touched,
        }
    return result


def _watch_metrics(target: np.ndarray, predicted: np.ndarray, scale: float) -> dict[str, float | None]:
    known = ~np.isnan(target)
    target, error = target[known].astype(np.float64), (predicted - target)[known].astype(np.float64)
    if not len(target):
        return {"rmse_log": None, "explained": None}
    variance = float(target.var())
    return {
        "rmse_log": scale * float(np.sqrt(np.square(error).mean())),
        "explained": 1 - float(np.square(error).mean()) / variance if variance else None,
    }


def read_truth(path: str, visit_id: np.ndarray) -> np.ndarray | None:
    """Read the true expected seconds of visits of a simulated world, ``[n]`` float64; None for other datasets.

    Training never calls this.
    """
    try:
        table = read_table(DatasetFiles(path), "truth/staytime.parquet", ["visit_id", "p_open", "seconds_if_open"])
    except FileNotFoundError:
        return None
    ids = table.column("visit_id").to_numpy()
    order = np.argsort(ids)
    at = order[np.searchsorted(ids, visit_id, sorter=order)]
    opened, stayed = (table.column(name).to_numpy()[at].astype(np.float64) for name in ("p_open", "seconds_if_open"))
    return opened * stayed


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Format a run's metrics as a text table: all held-out visits, groups by exposure, constants and truth."""
    lines: list[tuple[str, Values]] = [("all", metrics["all"])]
    lines += [(f"{name} exposures", values) for name, values in metrics["exposures"].items()]
    lines += [(f"constant: {name}", values) for name, values in metrics["constant"].items()]
    lines += [("true expectation", metrics["truth"])] if "truth" in metrics else []
    return text_table(
        ["held-out visits", *COLUMNS, "visits"],
        [
            [
                name,
                *(_cell(values.get(column)) for column in COLUMNS),
                f"{values.get('rows', metrics['all']['rows']):,}",
            ]
            for name, values in lines
        ],
    )


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def fitted_values(data: StaytimeData, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``fitted.json``: values fitted on the training range, and a digest of its inputs.

    A stored model may only be used with inputs for which this function returns the same content.
    """
    watch = {} if data.watch is None else {"watch": {"mean": data.watch.mean, "scale": data.watch.scale}}
    return {
        **watch,
        "base": facts,
        "fields": list(data.field_names),
        "dense": list(data.dense_names),
        "rows": data.rows,
        "training_visits": len(data.training),
        "opened_in_training": float((data.seconds[data.training] > 0).mean()),
        "comments_with_id": data.comments.id_rows - 1 if data.comments is not None else 0,
        "digest": _digest(data),
    }


def _digest(data: StaytimeData) -> str:
    """Hash the training visits: ids, inputs, labels, and the embedding rows of their comments."""
    rows, digest = data.training, hashlib.blake2b(digest_size=16)
    columns = [data.user_id, data.item_id, data.fields, data.dense, data.seconds, data.duration]
    for column in columns:
        digest.update(column[rows].tobytes())
    if data.comments is not None:
        chosen = data.comments.chosen[rows]
        # Sorted, because the order of a visit's comments is random.
        digest.update(np.sort(np.where(chosen >= 0, data.comments.id_row[chosen], -1), 1).tobytes())
    return digest.hexdigest()


def write_predictions(file: Path, data: StaytimeData, predictions: StaytimePredictions) -> None:
    """Write the predictions of the held-out visits as a Parquet table."""
    rows = data.held_out
    columns = {
        "visit_id": data.visit_id[rows],
        "user_id": data.user_id[rows],
        "item_id": data.item_id[rows],
        "seconds": data.seconds[rows],
        "predicted": predictions.seconds.astype(np.float32),
        "score": predictions.score.astype(np.float32),
    }
    with whole_file(file) as tmp_path:
        pq.write_table(pa.table(columns), tmp_path)
