"""Ranks of a job of ``trainer.align`` of which the last one is killed: ``python -m tests.semantic_ids.killed_align``.

The first argument is the step after which it is killed, the others are those of the job.
"""

from __future__ import annotations

import os
import signal
import sys

import trainer.align
from trainer.engine.hybrid_engine import StepResult
from trainer.ranking.training_state import TrainingState


def main(arguments: list[str]) -> int:
    last, advance = int(arguments[0]), TrainingState.advance

    def advance_or_die(self: TrainingState, result: StepResult) -> None:
        advance(self, result)
        if self.step == last and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingState.advance = advance_or_die  # type: ignore[method-assign]
    return trainer.align.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
