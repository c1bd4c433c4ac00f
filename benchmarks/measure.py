"""Shared parts of the benchmarks: options, result files, ranks in processes of their own, clocks, load, intervals."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from launch.python_path import ROOT, safe_environment
from trainer.console.outputs import local_argument
from trainer.runtime.environment import environment
from trainer.runtime.files import write_json


@dataclass(frozen=True)
class MachineLoad:
    """Work on the machine at one moment, this process's own included.

    Attributes:
        average: mean number of running processes of the last minute.
        seconds: reading of the clock.
        busy: processor seconds of all processes since the machine has started.
        own: processor seconds of this process and of its children that have ended.
    """

    average: float
    seconds: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> MachineLoad:
        """Read Linux's counters."""
        own = sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        # user, nice, system, idle, iowait, irq, softirq, steal; the rest is counted in user as well.
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return cls(os.getloadavg()[0], time.perf_counter(), busy, own)


_load_before = MachineLoad.now()
"""Load when this module was imported, before anything is measured."""


def load_facts(before: MachineLoad, after: MachineLoad) -> dict[str, float]:
    """Return the load averages before and after, and the cores that other processes have kept busy between the two."""
    elapsed = max(after.seconds - before.seconds, 1e-9)
    others = (after.busy - before.busy) - (after.own - before.own)
    return {
        "load_before": round(before.average, 2),
        "load_after": round(after.average, 2),
        "cores_of_others": round(max(0.0, others / elapsed), 2),
    }


def commit() -> str | None:
    """Return the checkout's commit, with ``+changes`` if files differ from it; None without git or a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--out`` that every benchmark has.

    Args:
        module: name of the benchmark, such as ``speed.loader``.
        description: docstring of its module, shown as it is written.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=local_argument, metavar="FILE.json", help="write the result to this file")
    return parser


def write_result(out: Path | None, document: Mapping[str, Any], ranks: int = 1) -> None:
    """Write a result with versions, machine, commit and load under ``environment``; do nothing without a file.

    Args:
        out: file to write; its directory is made.
        document: figures and settings.
        ranks: processes that were measured together.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        load = load_facts(_load_before, MachineLoad.now())
        write_json(out, {**document, "environment": {**environment(ranks), "commit": commit(), **load}})


def run_ranks(
    module: str, arguments: Sequence[object], ranks: int, threads: int = 1, cpu_only: bool = True
) -> dict[str, Any]:
    """Run a benchmark's own module on ranks started by torchrun, and return what its first rank wrote.

    Args:
        module: such as ``benchmarks.speed.dedup``; it gets the arguments and then the path of a JSON file to write.
        arguments: of its command line.
        ranks: processes.
        threads: of each.
        cpu_only: hide accelerators from the ranks.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", module, *map(str, arguments), out.name]
        settings = {"OMP_NUM_THREADS": str(threads), **({"CUDA_VISIBLE_DEVICES": ""} if cpu_only else {})}
        subprocess.run(command, check=True, env={**safe_environment(os.environ), **settings})
        result: dict[str, Any] = json.loads(Path(out.name).read_text())
    return result


def run_limelight(*arguments: object) -> None:
    """Run a ``limelight`` command as a user types it.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "launch.cli.main", *map(str, arguments)]
    subprocess.run(command, check=True, env=safe_environment(os.environ))


def slug(name: str) -> str:
    """Return a part's name for its files: "-" in place of all signs but letters and digits."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def busy_seconds(device: torch.device) -> float:
    """Return a clock: elapsed time of an idle accelerator, on a CPU the processor time of this process.

    Other work on the machine lengthens elapsed time, and processor time hardly.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def best_of(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest value of each key: other work on the machine makes a run slower, never faster."""
    return {key: max(run[key] for run in runs) for key in runs[0]}


def fastest(work: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeats):
        begin = clock()
        work()
        seconds.append(clock() - begin)
    return min(seconds)


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the largest of several runs, since a figure moves with the machine."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def spread_of(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the median, the least and the largest value of each key in several runs of the same work."""
    return {key: median_and_range([run[key] for run in runs]) for key in runs[0]}


def median_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median of each number in several runs of the same work, in sections too, and all runs below ``runs``.

    Names and sizes, which all runs have alike, are those of the first run.
    """
    return {**_medians(runs), "runs": list(runs)}


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, first in runs[0].items():
        values = [run[key] for run in runs]
        if isinstance(first, Mapping):
            found[key] = _medians(values)
        elif isinstance(first, int | float) and not isinstance(first, bool) and values.count(first) < len(values):
            found[key] = statistics.median(values)
        else:
            found[key] = first
    return found


def mean_and_half_width(values: Sequence[float | None]) -> list[float | None]:
    """Return the mean and half the width of its 95 % interval, by Student's t over the seeds.

    Both are None if a value is undefined or there is none; a single value has no interval.
    """
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known or len(known) < len(values):
        return [None, None]
    mean, n = float(np.mean(known)), len(known)
    if n == 1:
        return [mean, None]
    return [mean, float(student.ppf(0.975, n - 1) * np.std(known, ddof=1) / np.sqrt(n))]
