"""The ``limelight`` command. A command imports its work when it runs, so that ``--help`` loads nothing heavy."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

import click

from launch.cli import (
    align,
    bench,
    checkpoint,
    config,
    configs,
    data,
    doctor,
    foresight,
    jobs,
    models,
    plan,
    quantize,
    report,
    retrieve,
    runs,
    stream,
)
from launch.cli.command import Group
from launch.cli.version import print_versions
from trainer.console.errors import UserError
from trainer.console.exit_status import end_on_sigterm, exit_status
from trainer.console.job_arguments import usage_message

COMPLETE_VARIABLE = "_LIMELIGHT_COMPLETE"
"""Environment variable by which the completion script asks for completions."""

RENAMED = {
    ("instructions",): "limelight data instructions DATASET OUT",
    ("checkpoint", "export"): "limelight export RUN OUT",
    ("finetune", "merge"): "limelight export RUN OUT",
    ("staytime", "score"): "limelight score RUN OUT.parquet",
}
"""First words of an earlier spelling -> the present one."""

RENAMED_OPTIONS = {"--disorder-seconds": "--max-out-of-orderness-seconds"}


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    example="limelight train configs/simulated.toml --ranks 2",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_versions,
    help="Print the versions of Limelight and of its libraries.",
)
def limelight() -> None:
    """Train live-streaming recommenders."""


for command in (
    data.data,
    stream.stream,
    jobs.train,
    jobs.finetune,
    jobs.embed,
    jobs.staytime,
    foresight.foresight,
    quantize.quantize,
    align.align,
    retrieve.retrieve,
    models.evaluate,
    models.score,
    models.explain,
    models.export,
    runs.runs,
    report.report,
    checkpoint.checkpoint,
    config.config,
    configs.configs,
    plan.plan,
    bench.bench,
    doctor.doctor,
):
    limelight.add_command(command)


@limelight.command(short_help="Print the completion script of a shell.", example='eval "$(limelight completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh"]), help="Shell that completes.")
def completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    Put the example's line, with the name of your shell, into ~/.bashrc or ~/.zshrc.
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    print(script(limelight, {}, "limelight", COMPLETE_VARIABLE).source())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: trainer/console/exit_status.py has the table."""
    end_on_sigterm()
    return exit_status(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int | None:
    # Not click's own main(): it prints usage errors in several lines and has other exit statuses.
    if COMPLETE_VARIABLE in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(limelight, {}, "limelight", COMPLETE_VARIABLE, os.environ[COMPLETE_VARIABLE])
    _refuse_renamed(arguments)
    try:
        with limelight.make_context("limelight", arguments) as context:
            status: int | None = limelight.invoke(context)
            return status
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        raise UserError(_usage_message(error)) from None


def _refuse_renamed(arguments: Sequence[str]) -> None:
    """Answer an earlier spelling with the present one."""
    for words, present in RENAMED.items():
        if tuple(arguments[: len(words)]) == words:
            raise UserError(f"`limelight {' '.join(words)}` is now `{present}`")
    for argument in arguments:
        option = argument.split("=")[0]
        if option in RENAMED_OPTIONS:
            raise UserError(f"{option} is now {RENAMED_OPTIONS[option]}")


def _usage_message(error: click.UsageError) -> str:
    """Return a mistake in the arguments as one line, with the nearest command."""
    if not isinstance(error, click.NoSuchCommand) or error.ctx is None:
        return usage_message(error)
    assert isinstance(error.ctx.command, click.Group)
    known = _commands(error.ctx.command)
    # A sub-command without its group is answered with both words.
    known.update({path.split()[-1]: path for path in known.values() if path.split()[-1] not in known})
    nearest = difflib.get_close_matches(error.command_name, known, n=1)
    meant = f"; did you mean {known[nearest[0]]}?" if nearest else ""
    path = error.ctx.command_path
    return f"no command {error.command_name!r}{meant} ({path} --help shows what is accepted)"


def _commands(group: click.Group) -> dict[str, str]:
    """Return the commands of a group and of the groups in it, each as words separated by spaces."""
    paths = {}
    for name, member in group.commands.items():
        paths[name] = name
        if isinstance(member, click.Group):
            paths |= {f"{name} {path}": f"{name} {path}" for path in _commands(member)}
    return paths


if __name__ == "__main__":
    sys.exit(main())
