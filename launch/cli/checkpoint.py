"""``limelight checkpoint``: describe, verify and compare checkpoints."""

from __future__ import annotations

import sys

import click

from launch.cli.command import Group, json_option, print_json
from trainer.console.exit_status import CHECK_FAILED_STATUS
from trainer.console.outputs import InputPath


@click.group(cls=Group, example="limelight checkpoint show runs/first")
def checkpoint() -> None:
    """Describe, verify and compare checkpoints."""


@checkpoint.command(
    short_help="Print what a checkpoint holds.",
    example="limelight checkpoint show runs/first",
)
@click.argument("path", metavar="PATH", type=InputPath(), help="A checkpoint, or a run with checkpoints.")
@click.option("--all", "everything", is_flag=True, help="List every dense parameter, position and file.")
@json_option
def show(path: str, everything: bool, as_json: bool) -> None:
    """Print step, rows, tables with their sharding and optimizer state, network, positions and sizes.

    Of a run it is the newest complete checkpoint.
    """
    from trainer.checkpoint.describe import describe_checkpoint, format_checkpoint

    found = describe_checkpoint(path)
    print_json(found) if as_json else print(format_checkpoint(found, everything=everything))


@checkpoint.command(
    short_help="Compare the checksums of its files.",
    help="Read all files of a checkpoint, or of all checkpoints of a run, and compare their checksums.\n\n"
    f"Exit status {CHECK_FAILED_STATUS} if a checkpoint is damaged.",
    example="limelight checkpoint verify runs/first",
)
@click.argument("path", metavar="PATH", type=InputPath(), help="A checkpoint, or a run: all its checkpoints are read.")
@json_option
def verify(path: str, as_json: bool) -> int:
    """Print the state of each checkpoint, and the damage on stderr."""
    from trainer.checkpoint.describe import broken_line, format_verification, verify_checkpoints

    found = verify_checkpoints(path)
    print_json(found) if as_json else print(format_verification(found))
    broken = broken_line(found)
    if broken is None:
        return 0
    print(f"limelight: error: {broken}", file=sys.stderr)
    return CHECK_FAILED_STATUS


@checkpoint.command(
    short_help="Compare two checkpoints.",
    help="Compare the settings, tables, network and optimizers of two checkpoints, whatever ranks and shardings wrote "
    "them.\n\n"
    f"Exit status 0 if all tensors are equal, {CHECK_FAILED_STATUS} if not; settings do not count.",
    example="limelight checkpoint diff runs/first/checkpoints/step-00000120 runs/second",
)
@click.argument("first", metavar="A", type=InputPath(), help="A checkpoint, or a run with checkpoints.")
@click.argument("second", metavar="B", type=InputPath(), help="The other one.")
@click.option("--all", "everything", is_flag=True, help="List equal tensors as well.")
@json_option
def diff(first: str, second: str, everything: bool, as_json: bool) -> int:
    """Print the differences."""
    from trainer.checkpoint.diff import diff_checkpoints, format_diff

    found = diff_checkpoints(first, second)
    print_json(found) if as_json else print(format_diff(found, everything=everything))
    return 0 if found["equal"] else CHECK_FAILED_STATUS
