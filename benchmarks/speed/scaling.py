"""Measure how training scales from one rank to two, and the bytes that the ranks send.

    python -m benchmarks.speed.scaling --out benchmarks/results/scaling.json

The workload of ``benchmarks/speed/throughput.py`` in fp32, one thread a rank. Strong scaling keeps the global batch of
2,048 rows; weak scaling gives 2,048 rows to each rank. Efficiency is the rows a second divided by the ranks and by the
rate of one rank, all measured by turns in one call. Ranks beyond the machine's cores share them: such a row is marked
as over-subscribed, and shows only that the job works.

Bytes are those of a rank and a step that go to other ranks: ids, rows and gradients of the tables by
``all_to_all_single``; gradients of the dense network by ``all_reduce``, counted as a ring sends them, ``2 (n - 1) / n``
times their size.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import MachineLoad, load_facts, make_parser, median_and_range, run_ranks, write_result
from benchmarks.speed.dedup import AllToAllCounter
from benchmarks.speed.limelight_training import (
    WARM_UP_STEPS,
    WorkloadFeatures,
    make_engine,
    make_loader,
    make_ranker,
)
from benchmarks.speed.workload import BATCH, make_rows, write_dataset
from trainer.console.text_table import text_table
from trainer.data.format.schema import DatasetSpec
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.phase_timer import PHASES

SHORT = ("--steps", "5", "--repeats", "1", "--ranks", "1", "2")


class AllReduceCounter:
    """Stands in for ``all_reduce`` and counts the bytes that a ring of ranks sends for it."""

    def __init__(self) -> None:
        self.bytes, self._plain = 0.0, dist.all_reduce

    def __call__(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        ranks = dist.get_world_size(options.get("group"))
        self.bytes += 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size()
        return self._plain(tensor, *arguments, **options)


def train_rank(path: Path, batch_size: int, out: Path) -> None:
    """Train on one rank and count; the first rank writes the result."""
    with World.join("cpu") as world:
        features = WorkloadFeatures(DatasetSpec.load(path))
        tables, dense = AllToAllCounter(), AllReduceCounter()
        with patch.object(dist, "all_to_all_single", tables), patch.object(dist, "all_reduce", dense):
            engine = make_engine(features, make_ranker(features), "fp32", batch_size, world.device)
            rows, steps, started = 0, 0, 0.0
            seconds = dict.fromkeys(PHASES, 0.0)
            for number, result in enumerate(engine.steps(iter(make_loader(path, features, world, batch_size)))):
                if number >= WARM_UP_STEPS:
                    rows, steps = rows + result.rows_global, steps + 1
                    for phase in PHASES:
                        seconds[phase] += result.seconds[phase]
                elif number == WARM_UP_STEPS - 1:
                    tables.bytes, dense.bytes = 0, 0.0
                    started = time.perf_counter()
            elapsed = time.perf_counter() - started
        if world.rank == 0:
            total = sum(seconds.values())
            found = {
                "rows_per_second": rows / elapsed,
                "table_bytes": tables.bytes / steps,
                "dense_bytes": dense.bytes / steps,
                "shares": {phase: value / total for phase, value in seconds.items()},
            }
            write_json(out, found)
        engine.close()


def measure(path: Path, ranks: int, batch_size: int) -> dict[str, Any]:
    """Return one run on some ranks, ``batch_size`` rows each, with the load meanwhile."""
    before = MachineLoad.now()
    found = run_ranks("benchmarks.speed.scaling", ["--one", path, batch_size], ranks)
    return {**found, **load_facts(before, MachineLoad.now())}


def summary(kind: str, ranks: int, runs: Sequence[dict[str, Any]], single: float) -> dict[str, Any]:
    """Return the median, the spread and the efficiency of the runs on some ranks.

    Args:
        kind: ``strong`` or ``weak``.
        ranks: number of ranks.
        runs: runs on so many ranks.
        single: median rows a second of one rank.
    """
    rate = median_and_range([run["rows_per_second"] for run in runs])
    return {
        "kind": kind,
        "ranks": ranks,
        "over_subscribed": ranks > (os.cpu_count() or 1),
        "rows_per_second": rate,
        "efficiency": rate["median"] / (ranks * single),
        **{name: median_and_range([run[name] for run in runs])["median"] for name in ("table_bytes", "dense_bytes")},
        "shares": {phase: median_and_range([run["shares"][phase] for run in runs])["median"] for phase in PHASES},
        "runs": list(runs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.scaling", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide ids and batch by this, to try it (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        path, batch_size, out = options.one
        train_rank(Path(path), int(batch_size), Path(out))
        return
    if options.ranks[0] != 1:
        parser.error(f"--ranks {options.ranks[0]} ...: begin with 1, the rate that the others are compared with")
    batch = BATCH // options.scale
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # Every run has the same number of steps, so weak scaling reads more rows.
        for times in {1, *options.ranks}:
            rows = make_rows(times * batch * (WARM_UP_STEPS + options.steps), options.scale, seed=1)
            write_dataset(root / str(times), rows, options.scale)
        for _ in range(options.repeats):
            for ranks in options.ranks:
                runs.setdefault(("strong", ranks), []).append(measure(root / "1", ranks, batch // ranks))
                if ranks > 1:
                    runs.setdefault(("weak", ranks), []).append(measure(root / str(ranks), ranks, batch))
    single = median_and_range([run["rows_per_second"] for run in runs["strong", 1]])["median"]
    results = [summary(kind, ranks, of_kind, single) for (kind, ranks), of_kind in sorted(runs.items())]
    lines = [
        [
            found["kind"] if found["ranks"] > 1 else "-",
            f"{found['ranks']}" + (" (over-subscribed)" if found["over_subscribed"] else ""),
            f"{found['rows_per_second']['median']:,.0f}",
            f"{found['rows_per_second']['least']:,.0f} to {found['rows_per_second']['most']:,.0f}",
            f"{found['efficiency']:.0%}",
            f"{found['table_bytes'] / 1e6:.2f}",
            f"{found['dense_bytes'] / 1e6:.2f}",
            f"{found['shares']['communication']:.0%}",
        ]
        for found in results
    ]
    header = ["scaling", "ranks", "rows/s", "spread", "efficiency", "MB of tables", "MB of dense", "communication"]
    print(text_table(header, lines, texts=2))
    settings = {"batch": batch, "steps": options.steps, "repeats": options.repeats}
    write_result(options.out, {"results": results, "settings": settings}, ranks=max(options.ranks))


if __name__ == "__main__":
    main()
