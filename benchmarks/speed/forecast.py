"""Measure how many authors a second Foresight's predictor foresees on one core, and how many in a tick of 30 seconds.

    python -m benchmarks.speed.forecast --out benchmarks/results/forecast.json

Random weights and runs, no padding, float32, one thread, batches as ``limelight foresight forecast`` makes them. The
sizes are the paper's context of 100 runs that the encoder reads all, and that of ``configs/foresight.toml``.

``D`` is encoder and decoder alone; ``forecast`` adds the vectors that a ranker reads, with the mean of the centroids
under the softmax over all codes; ``log p`` is the logarithm of the probability of each code. Seconds are processor
time; all sizes and outputs run by turns, the best of several repeats counts, and the spread is stored. A product of
matrices on the same core says how fast the machine is at the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import best_of, fastest, make_parser, spread_of, write_result
from modules.foresight import ForesightPredictor, ForesightSize
from trainer.console.text_table import text_table
from trainer.semantic_ids.foresight_forecast import ROWS_AT_ONCE

SHORT = ("--repeats", "2")

CODES, CENTROID_DIM, REPEATS = 20_000, 128, 5
SIZES: dict[str, dict[str, Any]] = {
    "100 runs, all encoded": {"runs": 100, "copy": True},
    "128 runs, 16 encoded": {"runs": 128, "encoded_runs": 16, "softmax": "distance", "copy": True},
}
TARGET = 1500
"""Authors a second."""

TICK_SECONDS = 30


def outputs_of(codes: int, size: dict[str, Any], rows: int) -> dict[str, Callable[[], object]]:
    """Return the work of each output for a batch of authors."""
    torch.manual_seed(1)
    centroids = torch.randn(codes, CENTROID_DIM)
    predictor = ForesightPredictor(ForesightSize(codes, **size), centroids).eval()
    code = torch.randint(0, codes, (rows, size["runs"]), dtype=torch.int32)
    length = torch.randint(1, 4, (rows, size["runs"]), dtype=torch.int32)
    table = predictor.table()
    return {
        "D": lambda: predictor(code, length, table),
        "forecast": lambda: predictor.forecast(code, length, "mean", centroids, table),
        "log p": lambda: predictor.log_p(code, predictor(code, length, table), table),
    }


def gflop_per_second(repeats: int) -> float:
    """Return the rate of a product of matrices."""
    one = torch.randn(512, 512)
    return 2 * 512**3 / fastest(lambda: one @ one, 10 * repeats) / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.forecast", __doc__)
    parser.add_argument("--codes", type=int, default=CODES, help="codes (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS_AT_ONCE, help="authors of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repeats (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.inference_mode():
        machine = gflop_per_second(options.repeats)
        ways = {name: outputs_of(options.codes, size, options.rows) for name, size in SIZES.items()}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, outputs in ways.items():
                runs[name].append({output: options.rows / fastest(work, 1) for output, work in outputs.items()})
    found = {name: best_of(of_size) for name, of_size in runs.items()}
    names = list(next(iter(found.values())))
    lines = [[size, *(f"{rates[name]:,.0f}" for name in names)] for size, rates in found.items()]
    print(text_table(["authors/s and core", *names], lines))
    print(f"a product of matrices: {machine:.1f} GFLOP/s")
    result = {
        "question": "authors a second and core that Foresight's predictor foresees",
        "codes": options.codes,
        "rows": options.rows,
        "target": TARGET,
        "tick_seconds": TICK_SECONDS,
        "authors_a_second": found,
        "spread": {name: spread_of(of_size) for name, of_size in runs.items()},
        "gflop_a_second": machine,
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
