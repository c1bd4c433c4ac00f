"""Run all that only a GPU can show, in order of value, within ten minutes on one card.

    make test-gpu
    python -m benchmarks.speed.gpu --out benchmarks/results/gpu.json
    python -m benchmarks.speed.gpu --steps search ranker
    python -m benchmarks.speed.gpu --small    # tries the steps in a minute, on a CPU too

Each step is a process of its own, so that an error on the device, or a hang, ends that step alone. The result is
written after each step. A step says which package or device it lacks, and the next one goes on. The steps need nothing
but this project and the packages that ``pyproject.toml`` names; ``gpu_steps.py``, ``gpu_network_steps.py``,
``gpu_job_steps.py`` and ``gpu_stream_steps.py`` beside this file describe each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import make_parser, write_result
from benchmarks.speed import gpu_job_steps, gpu_network_steps, gpu_steps, gpu_stream_steps
from benchmarks.speed.gpu_steps import Missing
from launch.python_path import safe_environment
from trainer.runtime.files import write_json

STEPS = gpu_steps.STEPS | gpu_network_steps.STEPS | gpu_job_steps.STEPS | gpu_stream_steps.STEPS
"""Name -> step, in order of value."""

MINUTES = 10.0
LAST_CHARACTERS = 2000


def run_step(name: str, small: bool, seconds: float) -> dict[str, Any]:
    """Run a step in a process of its own.

    Returns:
        ``seconds``, and either ``result``, ``missing`` (a package or device that is not here) or ``failed`` (the last
        lines of its output).
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed.gpu",
            "--one",
            name,
            str(out),
            *(["--small"] if small else []),
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=safe_environment(os.environ),
            # A step may start processes; the limit of time ends them too.
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
            reason = output[-LAST_CHARACTERS:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            reason = f"{output[-LAST_CHARACTERS:]}\nended after its limit of {seconds:.0f} s"
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    # A step that was ended has written what it had measured until then.
    if process.returncode:
        found["failed"] = reason
    return {"seconds": round(time.monotonic() - started, 1), **found}


def run_one(name: str, small: bool, out: Path) -> None:
    """Run a step in this process and write its result, also after each part of it."""
    result: dict[str, Any] = {}
    try:
        for part in STEPS[name].run(small):
            result.update(part)
            write_json(out, {"result": result})
    except (ImportError, Missing) as error:
        write_json(out, {"missing": str(error), **({"result": result} if result else {})})


def outcome(step: dict[str, Any]) -> str:
    """Return one line about a step."""
    for word in ("failed", "missing", "not_started"):
        if word in step:
            lines = str(step[word]).strip().splitlines() or ["no output"]
            return f"{word.replace('_', ' ')}: {lines[-1][:150]}"
    return ", ".join(f"{key} {_short(value)}" for key, value in step["result"].items())[:300]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(part)}" for key, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the steps."""
    parser = make_parser("speed.gpu", __doc__)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="(default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="sizes of seconds")
    parser.add_argument("--one", nargs=2, metavar=("STEP", "FILE.json"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        run_one(options.one[0], options.small, Path(options.one[1]))
        return
    until = time.monotonic() + 60 * options.minutes
    steps: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(options.steps, 1):
        left = until - time.monotonic()
        print(f"[{number}/{len(options.steps)}] {name}, {left:.0f} s left", flush=True)
        if left < 1:
            steps[name] = {"seconds": 0.0, "not_started": "no time was left"}
        else:
            steps[name] = run_step(name, options.small, min(left, STEPS[name].seconds))
        print(f"    {steps[name]['seconds']:.0f} s: {outcome(steps[name])}", flush=True)
        write_result(options.out, {"small": options.small, "steps": steps})
    failed = [name for name, step in steps.items() if "failed" in step]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
