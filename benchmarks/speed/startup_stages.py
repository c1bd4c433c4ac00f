"""Moments of a start of ``limelight train``, for ``benchmarks/speed/startup.py``.

This module stands in for the command and for its rank, so it imports nothing itself: an import here would be measured.
Its arguments are ``command`` or ``rank``, the file of the result, and the arguments of ``limelight train``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

begun = time.monotonic()
"""The clock when this process ran its first line; it is the same for all processes of a machine."""

STAGES = ("interpreter", "command", "launch", "imports", "ranks", "data and model", "first step")
"""Stages from the command to the first step.

``interpreter``: until the command's first line. ``command``: its imports, and the check of the job file. ``launch``:
until the rank's first line. ``imports``: of ``trainer.rank``. ``ranks``: joining the process group. ``data and model``:
until the loop of the steps. ``first step``: its batch, and compilation.
"""


def run_command(out: str, arguments: Sequence[str]) -> int:
    """Run ``limelight train`` with one rank that ends after its first step."""
    from launch import local
    from launch.cli.main import main

    start_ranks = local.start_ranks

    def start_measured(module: str, arguments: Sequence[str], ranks: int) -> int:
        marks = {"command begins": begun, "command ends": time.monotonic()}
        Path(out).write_text(json.dumps(marks))
        return start_ranks("benchmarks.speed.startup_stages", ["rank", out, *arguments], ranks)

    local.start_ranks = start_measured
    return main(["train", *arguments])


def run_rank(out: str, arguments: Sequence[str]) -> int:
    """Run ``trainer.rank`` and leave the process after its first step."""
    from trainer import rank

    imported = time.monotonic()
    loaded = sorted(sys.modules)
    from trainer.engine.hybrid_engine import HybridEngine
    from trainer.runtime.distributed import World

    marks: dict[str, Any] = {"rank begins": begun, "imported": imported, "processor": time.process_time()}
    steps, join = HybridEngine.steps, World.join

    def join_measured(*given: Any, **options: Any) -> World:
        world = join(*given, **options)
        marks["joined"] = time.monotonic()
        return world

    def steps_measured(engine: HybridEngine, *given: Any, **options: Any) -> Iterator[Any]:
        marks["loop begins"] = time.monotonic()
        for _ in steps(engine, *given, **options):
            marks["first step"] = time.monotonic()
            marks["processor to first step"] = time.process_time()
            Path(out).write_text(json.dumps(json.loads(Path(out).read_text()) | marks | {"loaded": loaded}))
            # Nothing that follows is measured.
            sys.stdout.flush()
            os._exit(0)
        raise RuntimeError("the job has no training step")

    World.join = join_measured  # type: ignore[method-assign]
    HybridEngine.steps = steps_measured  # type: ignore[method-assign, assignment]
    return rank.main(arguments)


if __name__ == "__main__":
    run = {"command": run_command, "rank": run_rank}[sys.argv[1]]
    sys.exit(run(sys.argv[2], sys.argv[3:]))
