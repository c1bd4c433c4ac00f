"""Plans of the jobs that job files describe, printed and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.config_check import job_model, kind_of
from trainer.config.finetune import FinetuneConfig
from trainer.config.load import read_job
from trainer.config.ranker import JobConfig
from trainer.config.toml import validate
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec
from trainer.engine.build_engine import rows_per_rank
from trainer.planning.accelerators import Cluster
from trainer.planning.counted_ids import count_ids
from trainer.planning.plan_text import draw_plan, format_plan
from trainer.planning.ranker_plan import Assumptions, plan_ranker
from trainer.runtime.files import write_json


def plan_job(
    file: str,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    rows: Mapping[str, int],
    fill: float,
    distinct: float | None,
    zipf: float | None,
    count: bool,
    answers: float,
    mfu: float | None,
) -> dict[str, Any]:
    """Return the plan of the job that a file describes.

    Args:
        file: job file of a ranker or of a fine-tuning job.
        overrides: ``section.key=value``, as typed.
        cluster: the cluster.
        rows: table -> other number of rows.
        fill, distinct, zipf, mfu: see :class:`trainer.planning.ranker_plan.Assumptions`.
        count: count the ids of a rank's step in the dataset.
        answers: share of the tokens that have a loss.

    Raises:
        UserError: the file is of another kind of job or has a mistake, or the job cannot run on the cluster's ranks.
    """
    raw = read_job(file, overrides)
    kind = kind_of(raw, file)
    if kind not in ("train", "finetune"):
        raise UserError(f"{file}: is a job of limelight {kind}; limelight plan plans those of train and finetune")
    job = validate(job_model(kind), raw, file)
    assumed = Assumptions(fill, distinct, mfu, zipf)
    if isinstance(job, JobConfig):
        counted = count_ids(job, rows_per_rank(job, cluster.gpus)) if count else None
        return plan_ranker(job, DatasetSpec.load(job.data.path), cluster, assumed, rows, counted)
    assert isinstance(job, FinetuneConfig)
    from trainer.planning.language_model_plan import plan_finetune

    for option, given in (
        (f"--rows {next(iter(rows), '')}", bool(rows)),
        ("--count-ids", count),
        ("--distinct", distinct is not None),
        ("--zipf", zipf is not None),
    ):
        if given:
            raise UserError(f"{option}: a fine-tuning job has no tables")
    return plan_finetune(job, cluster, assumed, answers)


def write_plan(plan: Mapping[str, Any], directory: Path) -> None:
    """Write ``plan.json``, ``plan.txt`` and ``plan.svg`` to a directory, which is made; earlier ones are replaced.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "plan.json", plan)
        (directory / "plan.txt").write_text(format_plan(plan) + "\n")
        draw_plan(plan, directory / "plan.svg")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from None
