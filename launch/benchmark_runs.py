"""Benchmarks of a checkout: finding them without importing them, running them one after another."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import python_path
from trainer.console.errors import UserError
from trainer.console.exit_status import CHECK_FAILED_STATUS
from trainer.console.text_table import text_table

SHORT_NAME = "SHORT"
"""Constant of a benchmark in the short set: the arguments of a run of a minute or two."""

NOT_MEASURED = {"report"}
"""Modules with a ``main`` that measure nothing."""

TERMINATE_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL for a benchmark and the ranks that it has started."""


@dataclass(frozen=True)
class BenchmarkFile:
    """A benchmark of a checkout.

    Attributes:
        name: its module below ``benchmarks``, such as ``speed.loader``.
        question: first line of its docstring.
        short: arguments of its short run; None if it is not in the short set.
    """

    name: str
    question: str
    short: tuple[str, ...] | None

    @property
    def result(self) -> str:
        """Name of its JSON file, such as ``loader.json``."""
        return f"{self.name.rpartition('.')[2]}.json"


def find_benchmarks() -> list[BenchmarkFile]:
    """Return the benchmarks of this checkout by name; nothing of them is imported.

    Raises:
        UserError: Limelight is installed from a wheel, which has no benchmarks.
    """
    directory = python_path.ROOT / "benchmarks"
    if not (directory / "measure.py").is_file():
        raise UserError(f"{directory}: no benchmarks here, since a wheel has none; run this command in a checkout")
    found = []
    for file in sorted(directory.rglob("*.py")):
        source = file.read_text()
        if not re.search(r"^def main\(", source, re.MULTILINE):
            continue
        name = ".".join(file.relative_to(directory).with_suffix("").parts).removesuffix(".__main__")
        if name not in NOT_MEASURED:
            tree = ast.parse(source)
            question = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(":.")
            found.append(BenchmarkFile(name, question, _short_arguments(tree)))
    return sorted(found, key=lambda benchmark: benchmark.name)


def _short_arguments(tree: ast.Module) -> tuple[str, ...] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [SHORT_NAME]:
            return tuple(ast.literal_eval(node.value))
    return None


def select_benchmarks(names: Sequence[str], known: Sequence[BenchmarkFile]) -> list[BenchmarkFile]:
    """Return the benchmarks that names stand for: a benchmark, the end of its name, a folder, or ``all``.

    Raises:
        UserError: a name stands for nothing.
    """
    chosen: dict[str, BenchmarkFile] = {}
    for name in names:
        found = [it for it in known if name in ("all", it.name, it.name.rpartition(".")[2], it.name.partition(".")[0])]
        if not found:
            raise UserError(f"no benchmark {name!r}; there are {', '.join(it.name for it in known)}")
        chosen |= {it.name: it for it in found}
    return list(chosen.values())


def run_benchmarks(
    benchmarks: Sequence[BenchmarkFile], directory: Path | None, *, short: bool, options: str = ""
) -> int:
    """Run benchmarks one after another, print a line for each at the end, and return an exit status.

    A benchmark that fails does not keep the others from running.

    Args:
        benchmarks: benchmarks to run.
        directory: directory for a JSON file of each; it is made. None writes no files.
        short: run each at the size of the short set.
        options: further options of a single benchmark, in the syntax of a shell.

    Raises:
        UserError: options for several benchmarks, or a short run of a benchmark that has none.
    """
    if options and len(benchmarks) != 1:
        raise UserError(f"--options {options!r}: options are for one benchmark, and {len(benchmarks)} are chosen")
    without = [it.name for it in benchmarks if short and it.short is None]
    if without:
        raise UserError(f"{', '.join(without)}: not in the short set; leave out --short for a run of full size")
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--options {options!r}: {str(error).lower()}") from None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    lines, failed = [], []
    for number, benchmark in enumerate(benchmarks, 1):
        arguments = [*(benchmark.short or () if short else ()), *words]
        print(f"\n{number}/{len(benchmarks)} {shlex.join([benchmark.name, *arguments])}", flush=True)
        out = None if directory is None else directory / benchmark.result
        load, began = os.getloadavg()[0], time.monotonic()
        status = _run_to_end(benchmark.name, [*arguments, *([] if out is None else ["--out", str(out)])])
        seconds = time.monotonic() - began
        outcome = f"failed with status {status}" if status else "done" if out is None else str(out)
        lines.append([benchmark.name, f"{seconds:.0f}", f"{load:.1f}", f"{os.getloadavg()[0]:.1f}", outcome])
        failed += [benchmark.name] if status else []
    # The outcome is a text; the table aligns its last column right otherwise.
    table = [[name, outcome, *numbers] for name, *numbers, outcome in lines]
    print("\n" + text_table(["benchmark", "result", "seconds", "load before", "after"], table, texts=2))
    if failed:
        print(f"limelight: error: failed: {', '.join(failed)}", file=sys.stderr)
    return CHECK_FAILED_STATUS if failed else 0


def _run_to_end(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark and return its exit status; an exception, such as ctrl-C, ends its processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        env=python_path.safe_environment(os.environ),
        stdin=subprocess.DEVNULL,
        # A session of its own, so that one signal reaches the benchmark and the launcher of its ranks.
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
