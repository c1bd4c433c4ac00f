"""Measure the seconds from `limelight train` to the first step, and where they go.

    python -m benchmarks.speed.startup --out benchmarks/results/startup.json

A ranker on a small simulated world, one rank. Its stages are those of ``benchmarks/speed/startup_stages.py``; the job
ends after its first step. ``--fresh`` more starts have no compiled loops on disk, as on a machine that has never run a
job: the stages ``data and model`` and ``first step`` compile them.

The seconds of imports are split by package with ``python -X importtime``, each module without the modules that it
imports. Then the commands that need no model are timed, with the heavy packages that they load. Seconds are elapsed
time, so a busy machine makes them longer. The processor time of a rank until its modules are loaded, and until its
first step is done, stands beside them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import make_parser, median_and_range, run_limelight, write_result
from benchmarks.speed.startup_stages import STAGES
from launch.python_path import safe_environment
from trainer.console.text_table import text_table

SHORT = ("--repeats", "1", "--fresh", "0")

HEAVY = (
    "torch",
    "torchrec",
    "deepspeed",
    "transformers",
    "numpy",
    "pyarrow",
    "pandas",
    "pydantic",
    "numba",
    "matplotlib",
)
JOB_MODULE = "trainer.rank"
"""Module of a rank, whose imports are split by package."""

SHOWN = 12
"""Packages that the table of imports has a row for."""

COMMANDS = {
    "limelight --help": ["--help"],
    "limelight --version": ["--version"],
    "limelight runs": ["runs", "list", "{runs}"],
    "limelight config train": ["config", "train"],
    "limelight bench --list": ["bench", "--list"],
    "limelight checkpoint show --help": ["checkpoint", "show", "--help"],
}
_IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")
_PROGRAM = """
import sys
from launch.cli.main import main
main(sys.argv[1:])
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def first_step(job: Sequence[str], out: Path, cache: Path | None = None) -> dict[str, Any]:
    """Return the seconds of each stage of one start, and the modules that the rank has loaded by then.

    Args:
        job: arguments of ``limelight train``.
        out: file for the moments of the start.
        cache: empty directory for compiled loops; None for those that this machine keeps.

    Raises:
        subprocess.CalledProcessError: the job failed.
    """
    begin = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.speed.startup_stages", "command", str(out), *job]
    environment = {**safe_environment(os.environ), "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    subprocess.run(command, check=True, env=environment)
    marks: dict[str, Any] = json.loads(out.read_text())
    names = ("command begins", "command ends", "rank begins", "imported", "joined", "loop begins", "first step")
    ends = [marks[name] for name in names]
    stages = {stage: end - start for stage, start, end in zip(STAGES, [begin, *ends], ends, strict=False)}
    processor = {"imports": marks["processor"], "first step": marks["processor to first step"]}
    return {"stages": stages, "processor": processor, "loaded": marks["loaded"]}


def import_seconds(module: str) -> dict[str, float]:
    """Return the seconds that imports for a module take, by package, the slowest first."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=safe_environment(os.environ))
    seconds: dict[str, float] = defaultdict(float)
    for match in _IMPORT.finditer(done.stderr):
        seconds[match[2].partition(".")[0]] += int(match[1]) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def command_seconds(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the seconds of a command, and the heavy packages that it loads."""
    begin = time.monotonic()
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=safe_environment(os.environ))
    loaded = done.stderr.splitlines()[-1].split()
    return {"seconds": time.monotonic() - begin, "loaded": [name for name in HEAVY if name in loaded]}


def summary(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return seconds of some starts: of each stage, of all stages, and of the rank's processor; median and range."""
    return {
        "seconds_to_first_step": median_and_range([sum(start["stages"].values()) for start in starts]),
        "stages": {stage: median_and_range([start["stages"][stage] for start in starts]) for stage in STAGES},
        "processor_seconds_to_first_step": median_and_range([start["processor"]["first step"] for start in starts]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.startup", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts (default: %(default)s)")
    parser.add_argument("--users", type=int, default=100, help="users of the simulated world (default: %(default)s)")
    parser.add_argument("--fresh", type=int, default=1, help="starts without compiled loops (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        world, runs = Path(scratch) / "world", Path(scratch) / "runs"
        runs.mkdir()
        run_limelight("data", "simulate", world, "--users", options.users, "--days", 4, "--partitions", 2)
        job = ["configs/simulated.toml", f"data.path={world}", "data.eval_from=2024-03-07", "train.batch_size=64"]
        job[0] = str(Path(__file__).parents[2] / job[0])
        starts = [
            first_step([*job, f"run.directory={runs}/{number}"], Path(scratch) / "marks.json")
            for number in range(options.repeats)
        ]
        fresh = []
        for number in range(options.fresh):
            cache = Path(scratch) / f"cache-{number}"
            cache.mkdir()
            own = [*job, f"run.directory={runs}/fresh-{number}"]
            fresh.append(first_step(own, Path(scratch) / "marks.json", cache))
        imports = [import_seconds(JOB_MODULE) for _ in range(options.repeats)]
        commands = {
            name: [command_seconds([word.format(runs=runs) for word in words]) for _ in range(options.repeats)]
            for name, words in COMMANDS.items()
        }
    packages = {name: median_and_range([found.get(name, 0.0) for found in imports])["median"] for name in imports[0]}
    of_imports = sum(packages.values())
    result: dict[str, Any] = {
        **summary(starts),
        "processor_seconds_of_imports": median_and_range([start["processor"]["imports"] for start in starts]),
        "import_seconds_by_package": packages,
        "modules_loaded": starts[0]["loaded"],
        "commands": {
            name: {**median_and_range([run["seconds"] for run in found]), "loaded": found[0]["loaded"]}
            for name, found in commands.items()
        },
    }
    if fresh:
        result["fresh"] = summary(fresh)
    columns = {"seconds": result} | ({"no compiled loops": result["fresh"]} if fresh else {})
    lines = [[stage, *(f"{found['stages'][stage]['median']:.2f}" for found in columns.values())] for stage in STAGES]
    lines.append(["all", *(f"{found['seconds_to_first_step']['median']:.2f}" for found in columns.values())])
    print(text_table(["stage until the first step", *columns], lines))
    shown = [
        [name, f"{seconds:.2f}", f"{seconds / of_imports:.0%}"] for name, seconds in list(packages.items())[:SHOWN]
    ]
    print("\n" + text_table(["package imported by trainer.rank", "seconds", "share"], shown))
    of_commands = [
        [
            name,
            " ".join(found[0]["loaded"]) or "-",
            f"{median_and_range([run['seconds'] for run in found])['median']:.2f}",
        ]
        for name, found in commands.items()
    ]
    print("\n" + text_table(["command", "loads", "seconds"], of_commands, texts=2))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
