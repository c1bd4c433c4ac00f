"""Commands of `make full` that make its tables, for a world of another size and in another place."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("data/full", "runs/full")
"""Directories of `make full`."""


def make_full_lines(*variables: str) -> list[str]:
    """Return the lines of the recipe of `make full` that run ``limelight``, in their order.

    Args:
        variables: variables of make, such as ``USERS=100``.

    Raises:
        subprocess.CalledProcessError: make failed.
    """
    # Variables of a `make test` that runs this would be those of the nested make, too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "full", *variables]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    # A backslash at the end of a line continues it.
    return [line for line in printed.stdout.replace("\\\n", " ").splitlines() if ".venv/bin/limelight " in line]


def command_of(line: str) -> list[str]:
    """Return the words after ``limelight`` in a line of the recipe."""
    found = re.search(r"\.venv/bin/limelight ([^;]+)", line)
    assert found is not None, line
    return shlex.split(found[1])


def make_tables(work: Path, users: int, days: int, seed: int, run: Callable[..., None], small: Sequence[str]) -> None:
    """Make the world and the tables of `make full` below ``work``; a result that is there is not made again.

    Args:
        work: directory that stands for the working directory of `make full`.
        users, days, seed: of the world.
        run: function that runs ``limelight`` with its words as arguments.
        small: further settings of commands, each with the name of the command before it: ``align:train.epochs=1``.
    """
    for line in make_full_lines(f"USERS={users}", f"SEED={seed}", "RANKS=1"):
        result = re.search(r"test -e (\S+?);", line)
        # The last command, the training of the ranker, has no such result.
        if result is None:
            continue
        words = [in_place(work, word) for word in command_of(line)]
        if Path(in_place(work, result[1])).exists():
            continue
        if "--days" in words:
            words[words.index("--days") + 1] = str(days)
        # Only lines with a job file take settings.
        if any(word.startswith("configs/") for word in words):
            words += [setting.removeprefix(f"{words[0]}:") for setting in small if setting.startswith(f"{words[0]}:")]
        (work / "data/full").mkdir(parents=True, exist_ok=True)
        run(*words)


def in_place(work: Path, word: str) -> str:
    """Return a word with the directories of `make full` below ``work``."""
    return re.sub(rf"(^|=)({'|'.join(PLACES)})(?=/|$)", lambda found: f"{found[1]}{work}/{found[2]}", word)
