"""Write the forecast of each segment of a code file with a finished predictor. One process runs per rank.

    limelight foresight forecast runs/foresight --out data/forecasts
    torchrun --nproc-per-node 2 -m trainer.forecast runs/foresight --out data/forecasts

``limelight train`` reads a table with ``features.content.NAME.table=data/forecasts/decoder`` and ``of=segment``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from trainer.config.iso_time import time_text
from trainer.config.load import parse_time
from trainer.console.errors import UserError
from trainer.console.job_arguments import FORECAST_ARGUMENTS, parse_rank_arguments
from trainer.runtime.distributed import World, run_rank
from trainer.semantic_ids.code_files import read_codes
from trainer.semantic_ids.foresight_forecast import (
    Forecaster,
    ForecastSegments,
    forecast_origins,
    table_widths,
    write_forecasts,
)
from trainer.semantic_ids.foresight_model import TrainedPredictor

logger = logging.getLogger("trainer.forecast")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m trainer.forecast``."""
    options = parse_rank_arguments(
        "trainer.forecast", "Write forecasts; one process per rank.", FORECAST_ARGUMENTS, arguments
    )

    def job() -> None:
        with World.join("auto") as world:
            document = run_job(options, world)
            if world.rank == 0:
                print(json.dumps(document, indent=1) if options.as_json else summary(document))

    return run_rank(job)


def run_job(options: SimpleNamespace, world: World) -> dict[str, Any]:
    """Write the forecasts that the options ask for. Returns the numbers of segments. Collective."""
    model = TrainedPredictor.open(Path(options.run))
    file = Path(options.codes or model.config.data.codes)
    segments = ForecastSegments.of(read_codes(file, model.version))
    from_ms = 0 if options.every else model.seen_until_ms
    option = f"{file}: the first segment"
    if options.time_from:
        option = f"--from = {options.time_from}"
        from_ms = parse_time(options.time_from, model.timezone, "--from")
    if not options.every:
        model.check_from(option, from_ms)
    first = segments.since(from_ms)
    if first == len(segments):
        last = f"the last one at {time_text(int(segments.contexts.as_of_ms[-1]), model.timezone)}" if first else "none"
        raise UserError(
            f"{file}: no segment of a known author became known from {time_text(from_ms, model.timezone)} on ({last}), "
            "so there is nothing to forecast"
        )
    predictor, centroids = model.predictor().to(world.device), model.version.codebook.levels[0]
    runs = segments.contexts.run_counts(np.arange(first, len(segments)))
    write_forecasts(
        Path(options.out),
        segments,
        first,
        Forecaster(segments, predictor, centroids, options.pooling, world.device),
        table_widths(predictor, centroids),
        forecast_origins(model.version, model.directory.resolve().name, model.hash, options.pooling),
        world,
    )
    return {
        "out": options.out,
        "segments": len(segments) - first,
        "earlier": first,
        "seen": max(0, min(segments.since(model.seen_until_ms), len(segments)) - first),
        "without_author": segments.without_author,
        "short_contexts": int((runs < model.config.data.runs).sum()),
        "runs": model.config.data.runs,
    }


def summary(document: dict[str, Any]) -> str:
    """Return the numbers as text."""
    seen = f", {document['seen']:,} of them seen in training" if document["seen"] else ""
    return (
        f"{document['out']}: {document['segments']:,} segments with forecasts{seen}; {document['short_contexts']:,} "
        f"with fewer than {document['runs']} runs\nwithout a forecast: {document['earlier']:,} earlier segments, "
        f"{document['without_author']:,} without an author"
    )


if __name__ == "__main__":
    sys.exit(main())
