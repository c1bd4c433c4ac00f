"""``limelight bench``: the benchmarks of a checkout."""

from __future__ import annotations

import click

from launch.cli.command import Command
from trainer.console.outputs import LocalOutputPath


@click.command(
    cls=Command,
    short_help="Run benchmarks of a checkout.",
    help="Run benchmarks one after another; each prints a table. At full size one takes seconds to two hours.\n\n"
    "A NAME is a benchmark (speed.loader or loader), a folder (speed, quality, moment), or all. Without a NAME the "
    "short set runs, at small sizes, in about ten minutes on two cores.\n\nExit status 1: a benchmark has failed.",
    example="limelight bench speed.loader --json build/benchmarks",
)
@click.argument("names", metavar="[NAME ...]", nargs=-1, help="Benchmarks (default: the short set).")
@click.option(
    "--json",
    "directory",
    metavar="DIR",
    type=LocalOutputPath(),
    help="Directory for a JSON file of each benchmark: figures, machine, versions, commit and load.",
)
@click.option("--short", is_flag=True, help="Run the named benchmarks at the size of the short set.")
@click.option(
    "--options", metavar="TEXT", default="", help="Options of the one named benchmark, in the syntax of a shell."
)
@click.option("--list", "listing", is_flag=True, help="Print the benchmarks and run none; * is in the short set.")
def bench(names: tuple[str, ...], directory: str | None, short: bool, options: str, listing: bool) -> int:
    """Run the benchmarks, or list them."""
    from pathlib import Path

    from launch.benchmark_runs import find_benchmarks, run_benchmarks, select_benchmarks
    from trainer.console.text_table import text_table

    known = find_benchmarks()
    chosen = select_benchmarks(names, known) if names else [it for it in known if listing or it.short is not None]
    if listing:
        lines = [[it.name + (" *" if it.short is not None else ""), it.question] for it in chosen]
        print(text_table(["benchmark", "what it measures"], lines, texts=2))
        return 0
    path = None if directory is None else Path(directory)
    return run_benchmarks(chosen, path, short=short or not names, options=options)
