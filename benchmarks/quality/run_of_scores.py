"""Kept predictions as the directory of a run, for what reads the held-out rows of runs, such as ``quality.gap``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.larm_report import Scores
from trainer.config.ranker import JobConfig
from trainer.console.errors import UserError
from trainer.data.format.truth_rows import FACTORS, read_truth_rows
from trainer.ranking.held_out_rows import HELD_OUT
from trainer.runtime.files import whole_file, write_json


def write_run(directory: Path, job: JobConfig, scores: Scores) -> None:
    """Write a run that has a job and its held-out rows, and no model.

    Args:
        directory: of the run; files in it are replaced.
        job: the training, in a simulated world with factors.
        scores: its predictions; the times of their requests are read beside the factors.

    Raises:
        UserError: the dataset has no factors.
    """
    times = read_truth_rows(job.data.path, FACTORS, scores.user_id, scores.visit_id, ("request_ms",))
    if times is None:
        raise UserError(f"{job.data.path}: has no factors; make it with limelight data simulate --factors")
    columns = {"user_id": scores.user_id, "visit_id": scores.visit_id, **times}
    for k, name in enumerate(scores.behaviours):
        columns[f"p_{name}"] = scores.probability[:, k].astype(np.float32)
        columns[f"label_{name}"] = scores.label[:, k].astype(np.uint8)
        columns[f"mask_{name}"] = scores.mask[:, k].astype(np.uint8)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", job.model_dump(mode="json"))
    with whole_file(directory / HELD_OUT) as tmp_path:
        pq.write_table(pa.table(columns), tmp_path)
