"""Explain a prediction: for one user and one candidate, the attention of the model to each entry of the histories.

    limelight explain RUN --user 17 --candidate 4021 --at 2024-03-12T20:00

Histories are read as of ``--at``, as in scoring, and the model is the run's newest checkpoint. The result is printed as
text or JSON, and ``trainer/serving/explanation_plot.py`` draws it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.load import parse_time
from trainer.console.job_arguments import EXPLAIN_ARGUMENTS, parse_rank_arguments
from trainer.console.outputs import Output
from trainer.ranking.history_attention import explanation_document
from trainer.runtime.distributed import World, run_rank
from trainer.serving.explanation import explain, format_explanation
from trainer.serving.explanation_plot import write_picture
from trainer.serving.trained_run import open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``limelight explain`` and ``python -m trainer.explain``."""
    options = parse_rank_arguments("trainer.explain", "Explain a prediction of a run.", EXPLAIN_ARGUMENTS, arguments)

    def job() -> None:
        with World.join("auto") as world:
            if options.out:
                options.out.check()
            model = open_run(options.directory, world, options.data)
            spec = model.data.spec
            at_ms = parse_time(options.at, spec.timezone, "--at") if options.at else spec.span_ms[1]
            explanation = explain(model, options.user, options.candidate, at_ms)
            default = f"explain-{options.user}-{options.candidate}.png"
            out = options.out or Output.of(Path(options.directory) / default)
            if not options.as_json:
                print(format_explanation(explanation, spec.behaviours, spec.timezone, options.top))
            with out.writing(quiet=True) as picture:
                write_picture(picture, explanation)
            if options.as_json:
                document = explanation_document(explanation, spec.behaviours, options.top)
                print(json.dumps({**document, "picture": str(out)}, indent=1))
            else:
                print(f"\npicture: {out}")

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
