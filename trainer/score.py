"""Score candidates with a trained run, or an exported model: probabilities per behaviour and the ranking score.

The candidates file has the columns ``user_id``, ``item_id``, ``author_id`` and ``request_ms``, and one for each feature
of the request that the model uses; a missing feature counts as unknown. Features of users, authors and items, histories
and statistics come from the run's dataset, as of each request.

An exported model is scored without TorchRec and DeepSpeed: they are imported only to open a run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.console.job_arguments import SCORE_ARGUMENTS, parse_rank_arguments
from trainer.runtime.distributed import World, run_rank
from trainer.serving.exported_model import is_export, open_export
from trainer.serving.scoring import score_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``limelight score`` and ``python -m trainer.score``."""
    options = parse_rank_arguments("trainer.score", "Score candidates with a run.", SCORE_ARGUMENTS, arguments)

    def job() -> None:
        options.out.check()
        if is_export(options.directory):
            score_file(open_export(options.directory, options.data), Path(options.candidates), options.out)
            return
        from trainer.serving.trained_run import open_run

        with World.join("auto") as world:
            score_file(open_run(options.directory, world, options.data), Path(options.candidates), options.out)

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
