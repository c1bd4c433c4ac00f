"""Prediction of the visits of a range of time with the model of a finished staytime run.

limelight score runs/staytime predictions.parquet --from 2024-03-10

The inputs are built again from the run's own job. The dataset must therefore still have the visits of the training
range, because embedding rows of ids and popularity of comments are fitted on them; ``fitted.json`` is used to check
this. Later visits may have been added. The run's own range on the same machine gives the same predictions bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from trainer.comment_staytime.evaluation import evaluate, fitted_values, write_predictions
from trainer.comment_staytime.inputs import load_staytime
from trainer.comment_staytime.model import build_network, fit_base_on, predict
from trainer.config.load import parse_time
from trainer.config.staytime import StaytimeConfig, StaytimeDataConfig
from trainer.config.toml import validate_stored
from trainer.console.errors import UserError
from trainer.data.format.carried_dataset import dataset_of
from trainer.data.format.schema import DatasetSpec
from trainer.runtime.checksums import verify_checksums
from trainer.runtime.distributed import choose_device
from trainer.runtime.stored_files import open_regular, read_json_object


def score_range(
    run: Path, out: Path, *, data: str | None = None, time_from: str | None = None, time_until: str | None = None
) -> dict[str, Any]:
    """Write predictions of a range of time in the format of the run's predictions.parquet, and return their metrics.

    Args:
        run: directory of a finished run.
        out: Parquet file to write.
        data: path of the dataset; None for the run's own.
        time_from: first request; None for the start of the run's held-out range.
        time_until: end of the range, exclusive; None for the end of the run's held-out range.

    Raises:
        UserError: there is no finished run, the range overlaps the training range, the dataset's training range is not
            what the run was trained on, or ``out`` cannot be written.
    """
    config = load_staytime_run(run)
    verify_checksums(run, ("config.json", "fitted.json", "model.safetensors"))
    # Check cheap mistakes first, because reading the dataset takes longest.
    if not out.parent.is_dir():
        raise UserError(f"{out}: cannot be written, there is no directory {out.parent}")
    ranged = _in_range(config.data, dataset_of(run, config.data.path, data), time_from, time_until)
    config = config.model_copy(update={"data": ranged})
    columns = load_staytime(config.data, config.input, config.lcu, config.run.seed, config.watch)
    device = choose_device(config.train.device, 0)
    base = fit_base_on(config, columns)
    _check_same(run, config.data.path, fitted_values(columns, base.facts))
    network = build_network(config, columns, base)
    _load(network, run)
    predictions = predict(config, columns, base.to(device), network.to(device), device, columns.held_out)
    write_predictions(out, columns, predictions)
    return evaluate(config, columns, predictions)


def load_staytime_run(run: Path) -> StaytimeConfig:
    """Read the resolved job of a finished run of ``limelight staytime``.

    Raises:
        UserError: there is no such run, or it has not finished.
    """
    raw = _read(run / "config.json")
    if "lcu" not in raw:
        raise UserError(f"{run}: not a run of limelight staytime")
    if not (run / "metrics.json").exists():
        raise UserError(
            f"{run}: this run has not finished (metrics.json is missing); run its limelight staytime command again, "
            "which starts from the beginning"
        )
    return validate_stored(StaytimeConfig, raw, str(run / "config.json"))


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file.parent}: no run here ({file.name} is missing)") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _in_range(data: StaytimeDataConfig, path: str, time_from: str | None, time_until: str | None) -> StaytimeDataConfig:
    """Return the job's data section with another range to predict; the training range stays."""
    start, until, trained = (
        time_from or data.eval_from,
        time_until or data.eval_until,
        data.train_until or data.eval_from,
    )
    timezone = DatasetSpec.load(path).timezone
    first = parse_time(start, timezone, "--from")
    if first < parse_time(trained, timezone, "data.train_until"):
        raise UserError(f"--from = {start!r}: the run was trained on visits until {trained}; choose that or later")
    if until and parse_time(until, timezone, "--until") <= first:
        raise UserError(f"--until = {until!r}: must be later than --from = {start!r}")
    changes = {"path": path, "train_until": trained, "eval_from": start, "eval_until": until}
    return data.model_copy(update=changes)


def _check_same(run: Path, path: str, now: dict[str, Any]) -> None:
    then = _read(run / "fitted.json")
    # Through JSON, because tuples become lists there.
    now = json.loads(json.dumps(now))
    changed = [name for name in now if now[name] != then.get(name)]
    if changed:
        raise UserError(
            f"{path}: its training range is not what {run} was trained on ({', '.join(changed)} of fitted.json "
            f"{'differs' if len(changed) == 1 else 'differ'}); use the run's dataset, or the same with later visits"
        )


def _load(network: nn.Module, run: Path) -> None:
    file = run / "model.safetensors"
    try:
        open_regular(file).close()
        load_model(network, file)
    except FileNotFoundError:
        raise UserError(f"{run}: no run here ({file.name} is missing)") from None
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{file}: does not fit the run's job: {reason}; use the same lcu.item_embeddings and "
            "lcu.comment_embeddings as in training"
        ) from None
