"""Parse command lines of ``limelight`` without running them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click

from launch.cli.command import Command, Group
from launch.cli.main import limelight


def parse(line: str) -> click.Context:
    """Return the parsed context of a command line that starts with ``limelight``.

    Raises:
        click.UsageError: a command, an argument or an option that does not exist, or one that is missing.
    """
    program, *words = shlex.split(line)
    assert program == "limelight", line
    context = limelight.make_context(program, words)
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest:
            raise click.UsageError("Missing command.", context)
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context


def every_command(group: Group = limelight, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Command | Group]]:
    """Yield the words after ``limelight`` and the command, of all groups and commands, the root first."""
    yield " ".join(words), group
    for name, member in group.commands.items():
        if isinstance(member, Group):
            yield from every_command(member, (*words, name))
        else:
            assert isinstance(member, Command)
            yield " ".join((*words, name)), member
