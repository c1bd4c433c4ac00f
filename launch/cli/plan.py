"""``limelight plan``: what a job would need on a cluster that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from launch.cli.command import Command, json_option, messages_on_stderr, print_json
from trainer.console.errors import UserError
from trainer.console.job_arguments import TRAIN_ARGUMENTS
from trainer.console.outputs import InputPath, LocalOutputPath


class _TableRows(click.ParamType):
    """Type of ``TABLE=ROWS``."""

    name = "TABLE=ROWS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Parse what was typed."""
        if isinstance(value, tuple):
            return value
        table, equals, rows = str(value).partition("=")
        digits = rows.replace("_", "")
        if not table or not equals or not digits.isdecimal() or int(digits) < 2:
            self.fail(f"{value!r}: write TABLE=ROWS with 2 rows or more, such as item=2_000_000_000", param, ctx)
        return table, int(digits)


_SHARE = click.FloatRange(0, 1, min_open=True)


@click.command(
    cls=Command,
    params=list(TRAIN_ARGUMENTS),
    short_help="Plan a job on a cluster that is not here.",
    help="Plan a job of `limelight train` or `limelight finetune` on a cluster that is only described. Nothing is "
    "trained, and no GPU is needed: the dataset's description is read and no row of it, and no weight of a model.\n\n"
    "Of a ranker: where TorchRec's planner puts each table and how, the memory of a rank by part, the expected time of "
    "a step with its bottleneck, what does not fit and what would make it fit. Of a language model: the memory of a "
    "rank by part under ZeRO, the largest batch, tokens per second. docs/scaling.md has every formula, and what it was "
    "checked against.",
    example="limelight plan configs/simulated.toml --gpus 64 --gpu h200 --hosts 8 --rows user=400_000_000 "
    "train.batch_size=262144",
)
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="GPUs, one rank each.")
@click.option("--gpu", "gpu", default="h200", show_default=True, metavar="NAME", help="Kind of GPU, or `cpu`.")
@click.option("--hosts", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Machines.")
@click.option(
    "--gpu-file",
    metavar="PATH",
    type=InputPath(),
    help="TOML file with more kinds of GPUs, in the form of trainer/planning/gpus.toml.",
)
@click.option(
    "--rows",
    type=_TableRows(),
    multiple=True,
    metavar="TABLE=ROWS",
    help="Ranker: plan with another number of rows of a table than the job has. May be repeated.",
)
@click.option(
    "--fill",
    type=_SHARE,
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Ranker: mean length of a history, as a share of its largest one.",
)
@click.option(
    "--distinct",
    type=_SHARE,
    metavar="SHARE",
    help="Ranker: share of distinct ids among all ids of a rank in a step (default: the largest that independent draws "
    "have).",
)
@click.option(
    "--zipf",
    type=click.FloatRange(0, 4),
    metavar="EXPONENT",
    help="Ranker: users, authors and items are drawn by Zipf's law with this exponent; 1 is common, 0 draws evenly.",
)
@click.option(
    "--count-ids",
    is_flag=True,
    help="Ranker: read the rows of one rank's step from the dataset and count their ids, instead of assuming how they "
    "are distributed.",
)
@click.option(
    "--answers",
    type=_SHARE,
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Language model: share of the tokens that belong to answers.",
)
@click.option(
    "--mfu",
    type=_SHARE,
    metavar="SHARE",
    help="Share of the peak rate that matrix products reach (default: 0.3 for a ranker, 0.4 for a language model).",
)
@json_option
@click.option(
    "--out", metavar="DIR", type=LocalOutputPath(), help="Directory for plan.json, plan.txt and the picture plan.svg."
)
def plan(
    config: str,
    overrides: tuple[str, ...],
    gpus: int,
    gpu: str,
    hosts: int,
    gpu_file: str | None,
    rows: tuple[tuple[str, int], ...],
    fill: float,
    distinct: float | None,
    zipf: float | None,
    count_ids: bool,
    answers: float,
    mfu: float | None,
    as_json: bool,
    out: str | None,
) -> None:
    """Print the plan of a job."""
    from launch.plan_job import plan_job, write_plan
    from trainer.planning.accelerators import describe_cluster
    from trainer.planning.plan_text import format_plan

    given = [
        name
        for name, is_given in (
            ("--distinct", distinct is not None),
            ("--zipf", zipf is not None),
            ("--count-ids", count_ids),
        )
        if is_given
    ]
    if count_ids:
        given += ["--rows"] * bool(rows) + ["--fill"] * (fill != 1.0)
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say different things about the ids of a step; give one of them")
    cluster = describe_cluster(gpu, gpus, hosts, gpu_file)
    with messages_on_stderr(as_json):
        found = plan_job(
            config,
            overrides,
            cluster,
            rows=dict(rows),
            fill=fill,
            distinct=distinct,
            zipf=zipf,
            count=count_ids,
            answers=answers,
            mfu=mfu,
        )
        if out is not None:
            write_plan(found, Path(out))
    print_json(found) if as_json else print(format_plan(found))
