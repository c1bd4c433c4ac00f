"""``limelight report``: the page about a run."""

from __future__ import annotations

from pathlib import Path

import click

from launch.cli.command import Command
from trainer.console.outputs import InputPath, Output, OutputPath


@click.command(
    cls=Command,
    short_help="Write the page about a run.",
    help="Write one HTML page about a run from what the run has stored, also while it runs: metrics with intervals "
    "over users, baselines, curves, calibration, parts of the rows, throughput, tables, warnings, and the job with "
    "what differs from the defaults. The page needs no network and no scripts. A job of limelight train writes it at "
    "its end.",
    example="limelight report runs/first --out first.html",
)
@click.argument("run", metavar="RUN", type=InputPath(), help="Directory of a run of any kind.")
@click.option("--out", metavar="FILE", type=OutputPath(), help="File or URL to write (default: RUN/report.html).")
def report(run: str, out: Output | None) -> None:
    """Write the page."""
    from trainer.report.run_report import REPORT, write_report

    if out is not None:
        out.check()
    write_report(Path(run), out)
    print(f"report: {out or Path(run) / REPORT}")
