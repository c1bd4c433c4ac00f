"""Base classes of all commands: help that ends with an example, and options that several commands share."""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import click

FIT = "fit"
"""Command of a :class:`JobGroup` that takes a job file."""


LIST = "list"
"""Command of a :class:`RunsGroup` that takes a directory of runs."""


class Command(click.Command):
    """A command with an example at the end of its help.

    Args:
        example: a command line that works.
    """

    def __init__(self, *arguments: Any, example: str, **options: Any) -> None:
        super().__init__(*arguments, **{"epilog": _epilog(example), **options})
        self.example = example


class Group(click.Group):
    """A group of commands, listed in the order in which they were added, with an example at the end of its help."""

    command_class = Command
    group_class = type

    def __init__(self, *arguments: Any, example: str, **options: Any) -> None:
        # Without a command the answer is one line, as after every mistake.
        super().__init__(*arguments, **{"epilog": _epilog(example), "no_args_is_help": False, **options})
        self.example = example

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


class DefaultGroup(Group):
    """A group with a command whose name may be left out."""

    def complete(self, words: list[str]) -> list[str]:
        """Return the words after the group's name with the command that they leave out."""
        raise NotImplementedError

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words with the command that they leave out; a shell completes what was typed."""
        return super().parse_args(ctx, args if ctx.resilient_parsing else self.complete(args))


class RunsGroup(DefaultGroup):
    """A group in which no command, or a directory in its place, stands for the command :data:`LIST`."""

    def complete(self, words: list[str]) -> list[str]:
        """Return the words after the group's name with the command that they leave out."""
        named = bool(words) and (words[0] in self.commands or words[0] in ("-h", "--help"))
        return words if named else [LIST, *words]


class JobGroup(DefaultGroup):
    """A group in which a job file in place of a command stands for the command :data:`FIT`."""

    def complete(self, words: list[str]) -> list[str]:
        """Return the words after the group's name with the command that they leave out."""
        is_file = bool(words) and words[0] not in self.commands and (_is_job(words[0]) or os.path.isfile(words[0]))
        return [FIT, *words] if is_file else words


def _is_job(word: str) -> bool:
    return word.endswith(".toml")


def _epilog(example: str) -> str:
    # \b keeps click from wrapping the lines that follow.
    return f"\b\nExample:\n  {example}"


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def messages_on_stderr(wanted: bool) -> AbstractContextManager[Any]:
    """Return a context in which the messages of the work go to stderr, so that stdout holds a JSON document alone."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def print_json(document: Any) -> None:
    """Print a document as indented JSON."""
    print(json.dumps(document, indent=1))
