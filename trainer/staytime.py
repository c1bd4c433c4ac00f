"""Predict the seconds that a user stays in the comment area of a video, with or without LCU; train, and evaluate.

limelight staytime configs/staytime.toml base.loss=d2q

One process. The tables are those of users, videos and comments with some training rows, a few hundred MB at most, and
an epoch over a few million visits takes minutes: sharding them by TorchRec or the optimizer by DeepSpeed would cost
more than it saves, so this is a plain PyTorch loop on one device. A run that was ended begins anew. A finished one
predicts other visits by ``limelight score`` (``trainer/comment_staytime/scoring.py``). It leaves::

    config.json          the resolved job
    environment.json     versions, machine, command line
    fitted.json          what was fitted on the training range: the base's edges and means, features, coverage, a digest
    logs/                what the job said
    model.safetensors    the network
    predictions.parquet  visit_id, user_id, item_id, seconds, predicted, score of the held-out visits
    metrics.json         written last; a run with one has finished
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from trainer.checkpoint.run_directory import make_directory
from trainer.comment_staytime.evaluation import metrics_table, train_and_evaluate
from trainer.comment_staytime.inputs import load_staytime
from trainer.config.staytime import StaytimeConfig
from trainer.console.errors import UserError
from trainer.console.run_log import open_log
from trainer.runtime.distributed import choose_device
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json
from trainer.runtime.run_lock import locked

logger = logging.getLogger("trainer.staytime")


def run_job(config: StaytimeConfig) -> None:
    """Train and evaluate the model of a job, and write the run."""
    device = choose_device(config.train.device, 0)
    directory = Path(config.run.directory or f"runs/{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (directory / "metrics.json").exists():
        raise UserError(f"{directory}: a finished run is already here; choose another run.directory or remove it")
    data = load_staytime(config.data, config.input, config.lcu, config.run.seed)
    make_directory(directory)
    with locked(directory):
        open_log(directory / "logs", 0)
        write_json(directory / "config.json", config.model_dump(mode="json"))
        write_json(directory / "environment.json", {"command": sys.argv, **environment(1)})
        metrics = train_and_evaluate(config, data, device, directory)
        write_json(directory / "metrics.json", metrics)
    logger.info("\n" + metrics_table(metrics))
    logger.info(f"\nrun: {directory}")
