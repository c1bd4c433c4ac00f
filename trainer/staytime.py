"""Train and evaluate a model of the seconds that a user stays in the comment area of a video, with or without LCU.

limelight staytime configs/staytime.toml base.loss=d2q

The job is one process with a plain PyTorch loop on one device. The embedding tables hold only users, videos and
comments with some training rows, a few hundred MB at most, and an epoch over a few million visits takes minutes:
sharding with TorchRec and DeepSpeed would cost more than it saves. An interrupted run starts again from the beginning.
``limelight score RUN OUT.parquet`` predicts other visits with a finished run (``trainer/comment_staytime/scoring.py``).
A run has these files::

    config.json          the resolved job
    environment.json     versions, machine, command line
    fitted.json          values fitted on the training range (of the base loss, features), and a digest of its inputs
    logs/                log of the job
    model.safetensors    the network
    predictions.parquet  visit_id, user_id, item_id, seconds, predicted, score of the held-out visits
    checksums.json       size and CRC-32 of config.json, fitted.json and model.safetensors
    metrics.json         metrics; written last, so a run that has it has finished
"""

from __future__ import annotations

import logging
import sys
import time

from trainer.checkpoint.run_directory import run_directory
from trainer.checkpoint.tracked_metrics import mlflow_target, write_metrics
from trainer.comment_staytime.evaluation import metrics_table, train_and_evaluate
from trainer.comment_staytime.inputs import load_staytime
from trainer.config.paths import absolute_paths
from trainer.config.staytime import StaytimeConfig
from trainer.console.errors import UserError
from trainer.console.outputs import local_path
from trainer.console.run_log import open_log
from trainer.runtime.checksums import write_checksums
from trainer.runtime.distributed import choose_device
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json

logger = logging.getLogger("trainer.staytime")


def run_job(config: StaytimeConfig) -> None:
    """Train and evaluate the model of a job, and write the run directory.

    Raises:
        UserError: a finished run is already there, or the data or the job has a mistake.
    """
    device = choose_device(config.train.device, 0)
    directory = local_path(config.run.directory or f"runs/{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (directory / "metrics.json").exists():
        raise UserError(f"{directory}: a finished run is already here; choose another run.directory or remove it")
    data = load_staytime(config.data, config.input, config.lcu, config.run.seed, config.watch)
    with run_directory(directory, job="staytime", mlflow=mlflow_target(config, directory)):
        open_log(directory / "logs", 0)
        write_json(directory / "config.json", absolute_paths(config).model_dump(mode="json"))
        write_json(directory / "environment.json", {"command": sys.argv, **environment(1)})
        metrics = train_and_evaluate(config, data, device, directory)
        write_checksums(directory, ("config.json", "fitted.json", "model.safetensors"))
        write_metrics(directory, metrics, len(metrics["losses"]))
    logger.info("\n" + metrics_table(metrics))
    logger.info(f"\nrun: {directory}")
