"""What a model looked at: for one user and one candidate, the entries of each history and their share of attention.

    limelight explain RUN --user 17 --candidate 4021 --at 2024-03-12T20:00

Each history is read as of the time, as it is when candidates are scored; the model is that of the run's newest
checkpoint. Told as text, and drawn: ``trainer/serving/explanation_plot.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.load import parse_time
from trainer.console.job_arguments import EXPLAIN_ARGUMENTS, parse_rank_arguments
from trainer.runtime.distributed import World, run_rank
from trainer.serving.explanation import document_of, explain, text_of
from trainer.serving.explanation_plot import write_picture
from trainer.serving.trained_run import open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``limelight explain`` and ``python -m trainer.explain``."""
    given = parse_rank_arguments("trainer.explain", "What a run's model looked at.", EXPLAIN_ARGUMENTS, arguments)

    def job() -> None:
        with World.join("auto") as world:
            model = open_run(given.directory, world)
            spec = model.data.spec
            at_ms = parse_time(given.at, spec.timezone, "--at") if given.at else spec.span_ms[1]
            explanation = explain(model, given.user, given.candidate, at_ms)
            default = f"explain-{given.user}-{given.candidate}.png"
            picture = Path(given.out) if given.out else Path(given.directory) / default
            if not given.as_json:
                print(text_of(explanation, spec.behaviours, spec.timezone, given.top))
            write_picture(picture, explanation)
            if given.as_json:
                document = document_of(explanation, spec.behaviours, given.top)
                print(json.dumps({**document, "picture": str(picture)}, indent=1))
            else:
                print(f"\npicture: {picture}")

    return run_rank(job)


if __name__ == "__main__":
    sys.exit(main())
