"""Ranks of a Foresight job that are asked to stop: ``python -m tests.semantic_ids.stopped_foresight JOB STEPS``."""

from __future__ import annotations

import sys

from tests.llm.tiny import StopAfter
from trainer.config.foresight import load_foresight
from trainer.foresight import run_job
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preempted


def main(job: str, steps: str) -> None:
    with World.join("cpu") as world:
        try:
            run_job(load_foresight(job), world, StopAfter(int(steps)))
        except Preempted:
            return
    raise SystemExit("the job was not stopped")


if __name__ == "__main__":
    main(*sys.argv[1:])
