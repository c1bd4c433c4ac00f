"""``limelight runs``: the runs below a directory, and comparisons of them."""

from __future__ import annotations

from pathlib import Path

import click

from launch.cli.command import LIST, RunsGroup, json_option, print_json
from trainer.console.outputs import InputPath


@click.group(
    cls=RunsGroup,
    short_help="List runs, or compare them.",
    help="List the runs below a directory with their state, progress and metrics.\n\n"
    "A directory in place of the command, or nothing at all, means `limelight runs list`.",
    example="limelight runs --sort click.auc",
)
def runs() -> None:
    """List and compare runs."""


@runs.command(
    LIST,
    short_help="Print the runs below a directory.",
    help="Print a row for each run in a directory and below it, of every kind of job: name, kind, state, metrics, "
    "steps and rows per second of the training. A run is running, stopped, finished, failed or damaged; lines below "
    "the table say why, and how far a running job is.\n\n"
    "Runs inside of a run are found if they are its direct entries.",
    example="limelight runs list runs --sort click.auc",
)
@click.argument(
    "directory", metavar="[DIR]", type=InputPath(), default="runs", help="Directory of runs (default: runs)."
)
@click.option(
    "--sort",
    metavar="METRIC",
    default="",
    help="Best first by a metric, such as click.auc, or its end, such as auc; or by steps, rows_per_second or started.",
)
@json_option
def list_(directory: str, sort: str, as_json: bool) -> None:
    """Print the runs."""
    from trainer.checkpoint.runs import format_runs, list_runs

    found = list_runs(Path(directory), sort)
    if as_json:
        print_json([run.document() for run in found])
    else:
        print(format_runs(found, sort) if found else f"{directory}: no runs here")


@runs.command(
    short_help="Compare runs side by side.",
    help="Print the metrics of runs side by side, and the settings that differ. Where the runs have kept predictions "
    "of the same held-out rows, as rankers do, the metrics are computed on the rows that are in all of them, and each "
    "difference to the first run has a 95 % interval over users (paired bootstrap).\n\n"
    "A baseline is compared by its directory, such as runs/first/baselines/logistic.",
    example="limelight runs compare runs/first runs/second",
)
@click.argument(
    "directories",
    metavar="RUN RUN...",
    nargs=-1,
    required=True,
    type=InputPath(),
    help="Directories of two runs or more.",
)
@json_option
def compare(directories: tuple[str, ...], as_json: bool) -> None:
    """Print the comparison."""
    from trainer.report.compare import compare_runs, format_comparison

    found = compare_runs(directories)
    print_json(found.document()) if as_json else print(format_comparison(found))
