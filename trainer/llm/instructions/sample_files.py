"""Directory of sample files: both splits as JSON Lines and a manifest, complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError, failure_reason

MANIFEST = "manifest.json"
SPLITS: tuple[str, ...] = ("train", "evaluate")

Record = dict[str, Any]
"""Sample as in the file."""

Report = Callable[[str, int, int], None]
"""Callback of progress: phase, number of samples so far, and the most there can be."""


@contextmanager
def new_samples(out: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``out``, and rename it to ``out`` after the block.

    Raises:
        UserError: ``out`` exists or cannot be written.
    """
    out_dir = Path(out)
    check_new(out)
    tmp_path = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    try:
        tmp_path.mkdir(parents=True)
        yield tmp_path
        os.rename(tmp_path, out_dir)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({failure_reason(error)})") from error
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def check_new(out: str | Path) -> None:
    """Check that a directory does not exist yet.

    Raises:
        UserError: it exists.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; choose another directory or remove it")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a directory of samples."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def write_lines(file: Any, records: Iterable[Record]) -> int:
    """Write records as JSON lines; return their number."""
    lines = 0
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        lines += 1
    return lines


def reported(records: Iterable[Record], phase: str, total: int, report: Report) -> Iterable[Record]:
    """Yield ``records`` and report their number, every thousand and at the end."""
    done = 0
    for done, record in enumerate(records, 1):
        if done % 1000 == 0:
            report(phase, done, total)
        yield record
    report(phase, done, done)


def no_report(phase: str, done: int, total: int) -> None:
    """Report nothing."""


def check_least(plan: object, least: Mapping[str, int]) -> None:
    """Check that settings of a plan are at least the given values.

    Raises:
        UserError: a setting is smaller; the message has the option of the command.
    """
    for name, lowest in least.items():
        value = getattr(plan, name)
        if value < lowest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {lowest} or more")


def check_most(most: Mapping[str, int], tasks: Iterable[str]) -> None:
    """Check the limits of single tasks.

    Raises:
        UserError: ``most`` names an unknown task, or a limit is negative.
    """
    for task, limit in most.items():
        if task not in tasks or limit < 0:
            raise UserError(f"--most {task}={limit}: write TASK=N; tasks are {', '.join(tasks)}, N is 0 or more")
