"""``limelight doctor``: check the installation and the machine."""

from __future__ import annotations

import click

from launch.cli.command import Command, json_option
from trainer.console.exit_status import CHECK_FAILED_STATUS


@click.command(
    cls=Command,
    short_help="Check the installation and this machine.",
    help="Check packages, accelerator, process groups, ports, shared memory and disk, and print what to type where "
    f"something is wrong.\n\nExit status {CHECK_FAILED_STATUS} if a check failed.",
    example="limelight doctor --json",
)
@json_option
def doctor(as_json: bool) -> int:
    """Run all checks."""
    from launch.doctor.report import examine

    return examine(as_json=as_json)
