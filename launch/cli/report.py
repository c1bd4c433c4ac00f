"""``limelight report``: the page about a run, or about several side by side."""

from __future__ import annotations

from pathlib import Path

import click

from launch.cli.command import Command
from trainer.console.outputs import InputPath, Output, OutputPath


@click.command(
    cls=Command,
    short_help="Write the page about a run, or several.",
    help="Write one HTML page about a run from what the run has stored, also while it runs: metrics with intervals "
    "over users, baselines, curves, calibration, parts of the rows, throughput, tables, warnings, and the job with "
    "what differs from the defaults. The page needs no network and no scripts. A job of limelight train writes it at "
    "its end. The other jobs have pages of their own; a codebook version and a directory of embeddings have one, too."
    "\n\n"
    "Further runs stand beside the first one: metrics and curves of all of them, differences with paired intervals, "
    "and the settings that differ. With --against the differences are from that run, and the job file has a comment "
    "wherever that run has another value.",
    example="limelight report runs/first --out first.html",
)
@click.argument(
    "directories",
    metavar="RUN [RUN...]",
    nargs=-1,
    required=True,
    type=InputPath(),
    help="Directory of a run of any kind, of a codebook or of embeddings, and of runs to compare it with.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=OutputPath(),
    help="File or URL to write (default: RUN/report.html; needed for several runs).",
)
@click.option(
    "--against",
    metavar="RUN",
    type=InputPath(),
    help="Run, or baseline of a run, with which metrics and job file are compared.",
)
@click.option(
    "--watch", is_flag=True, help="Write the page again every 30 seconds until the job ends; it reloads itself."
)
def report(directories: tuple[str, ...], out: Output | None, against: str | None, watch: bool) -> None:
    """Write the page."""
    run, *others = directories
    if others and out is None:
        raise click.UsageError("a page about several runs needs --out FILE")
    from trainer.report.run_report import REPORT, watch_report, write_report

    if out is not None:
        out.check()
    if watch:
        print(f"report: {out or Path(run) / REPORT}, again until the job ends", flush=True)
    write = watch_report if watch else write_report
    write(Path(run), out, [Path(other) for other in others], Path(against) if against else None)
    if out is not None or (Path(run) / REPORT).exists():
        print(f"report: {out or Path(run) / REPORT}")
