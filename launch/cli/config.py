"""``limelight config``: print the keys of a job file, or check one."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from launch.cli.command import Command, Group, json_option, messages_on_stderr, print_json
from launch.cli.jobs import ranks_option
from trainer.console.exit_status import USER_ERROR_STATUS
from trainer.console.job_arguments import OVERRIDES
from trainer.console.outputs import InputPath

JOBS = ("train", "finetune", "embed", "staytime", "quantize", "align", "foresight")
"""Commands that take a job file."""

FILE = click.Argument(["file"], metavar="FILE", type=InputPath(), help="Job file.")


@click.group(cls=Group, example="limelight config check configs/simulated.toml")
def config() -> None:
    """Print the keys of a job file, or check one."""


def _reference_command(name: str, job: str) -> Command:
    @click.command(
        cls=Command,
        name=name,
        hidden=name != job,
        short_help=f"Print the keys of a job file of limelight {job}.",
        help=f"Print every key of a job file of `limelight {job}` with type, default and meaning, as Markdown "
        "tables.\n\n"
        "--json prints the JSON Schema instead, which editors use to check TOML files.",
        example=f"limelight config {name}",
    )
    @json_option
    def print_reference(as_json: bool) -> None:
        from launch.config_check import job_model
        from trainer.config.reference import reference

        model = job_model(job)
        print_json(model.model_json_schema()) if as_json else print(reference(model))

    return print_reference


for _job in JOBS:
    config.add_command(_reference_command(_job, _job))
# The job of `limelight train` is `trainer.rank`.
config.add_command(_reference_command("rank", "train"))


@config.command(
    params=[FILE, OVERRIDES],
    short_help="Check a job file and its dataset.",
    help="Check a job file of any kind and its dataset without training: keys and values, that the dataset opens, and "
    "that times, behaviours, features, samples or texts fit it, as the job itself would check them. Prints one line "
    f"for each problem.\n\nExit status {USER_ERROR_STATUS} if there is a problem.",
    example="limelight config check configs/simulated.toml --ranks 2 train.epochs=2",
)
@click.option("--kind", type=click.Choice(JOBS), help="Command that the file is for (default: found by its sections).")
@ranks_option
@json_option
def check(file: str, overrides: tuple[str, ...], kind: str | None, ranks: int, as_json: bool) -> int:
    """Print the problems of a job file, or what was checked."""
    from launch.config_check import check_job

    with messages_on_stderr(as_json):
        found = check_job(file, overrides, kind, ranks)
    if as_json:
        print_json({**asdict(found), "ok": not found.problems})
    else:
        for problem in found.problems:
            print(f"limelight: error: {problem}", file=sys.stderr)
        if not found.problems:
            print(f"ok: {file} is a job of limelight {found.kind}; checked: {', '.join(found.checked)}")
    return USER_ERROR_STATUS if found.problems else 0
