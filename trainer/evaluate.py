"""Evaluate a trained run on a time range that it was not trained on.

    limelight evaluate RUN --data PATH --from 2022-05-04 --until 2022-05-06

``trainer/rank.py`` evaluates a model with the same functions at the end of training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from trainer.console.errors import UserError
from trainer.console.job_arguments import EVALUATE_ARGUMENTS, parse_rank_arguments
from trainer.ranking.evaluation import evaluate, predict, read_truth, write_predictions
from trainer.ranking.metrics_table import metrics_table
from trainer.ranking.setup import freeze_at_end_of_training, held_out_loader, split_in_time
from trainer.runtime.distributed import World, run_rank
from trainer.serving.trained_run import open_run, with_range


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``limelight evaluate`` and ``python -m trainer.evaluate``."""
    options = parse_rank_arguments("trainer.evaluate", "Evaluate a finished run.", EVALUATE_ARGUMENTS, arguments)

    def job() -> None:
        with World.join("auto") as world:
            if options.predictions and world.rank == 0:
                options.predictions.check()
            run = open_run(options.directory, world, options.data)
            config = with_range(run.config, options.time_from, options.time_until)
            split = split_in_time(config, run.data.spec)
            frozen = freeze_at_end_of_training(config, run.data, split)
            loader = held_out_loader(config, run.data, split, run.features, world, frozen, run.space)
            if not world.sum(loader.rows_total):
                raise UserError(
                    f"{config.data.path}: no rows in the range {config.data.eval_from} to {config.data.eval_until}"
                )
            held_out = predict(run.engine, loader, quiet=options.json or world.rank > 0)
            behaviours = run.features.behaviours
            truth = read_truth(config.data.path, held_out, behaviours)
            report = evaluate(held_out, behaviours, world.control, truth)
            if options.predictions:
                write_predictions(options.predictions, held_out, behaviours, world)
            if world.rank == 0:
                document = {"behaviours": report, "model": config.model.kind}
                print(json.dumps(document, indent=1) if options.json else metrics_table({config.model.kind: report}))

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
