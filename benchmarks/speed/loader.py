"""Measure the rows a second of the loader, and the share of each stage.

    python -m benchmarks.speed.loader --out benchmarks/results/loader.json
    python -m benchmarks.speed.loader --config configs/simulated.toml

Without a job it writes a dataset of random numbers, wider than the workload of ``benchmarks/speed/throughput.py``: 30
side features, 8 dense values, 6 statistics, 7 behaviours and two full histories of 50. It reports

* rows per second by number of workers, in elapsed time and per second of CPU time of all processes together, which
  other work on the machine hardly disturbs;
* without workers, the share of each stage: reading and decoding records, gathering rows, histories, ids and dense
  inputs, planning, and the rest: the loop and the KeyedJaggedTensors.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import best_of, make_parser, spread_of, write_result
from trainer.config.features import FeatureConfig
from trainer.config.ranker import load_config
from trainer.data.features.feature_map import FeatureMap
from trainer.data.features.fit import fit_features
from trainer.data.format.history import FOLDER, Histories, HistoryWriter
from trainer.data.format.schema import DatasetSpec, DenseFeature, IdSpace, Rows, SideFeature, partition_of
from trainer.data.format.shards import RowStore, write_rows
from trainer.data.format.time_selection import Selection
from trainer.data.loading.batch_plan import ReadPlan
from trainer.data.loading.block_reader import BlockReader
from trainer.data.loading.loader import Loader

SHORT = ("--rows", "60000", "--workers", "0", "1", "--repeats", "2")

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000
DAYS = 2
USERS, AUTHORS, ITEMS = 20_000, 100_000, 1_000_000
BEHAVIOURS = ("click", "effective_view", "long_view", "like", "comment", "gift", "follow")
REST = "planning the order, KeyedJaggedTensors, loop"


@dataclass(frozen=True)
class Workload:
    """A dataset and everything that a loader of it needs."""

    spec: DatasetSpec
    store: RowStore
    histories: Histories
    features: FeatureMap
    selection: Selection
    shuffle_ms: int

    def loader(self, batch_size: int, workers: int) -> Loader:
        """Return a loader of all rows on one rank."""
        return Loader(
            self.store,
            self.histories,
            self.features,
            rank=0,
            world=1,
            batch_size=batch_size,
            seed=1,
            selection=self.selection,
            shuffle_ms=self.shuffle_ms,
            workers=workers,
        )


def random_dataset(path: Path, rows: int) -> None:
    """Write a dataset of random numbers, with histories longer than those that are read."""
    rng = np.random.default_rng(0)
    owners = ("user", "author", "item", "context")
    side = tuple(SideFeature(f"side_{k}", owners[k % 4], (24, 1000, 500, 8)[k % 4]) for k in range(30))  # type: ignore[arg-type]
    keys = (("user",), ("author",), ("item",), ("side_0",), ("user", "side_0"), ("item", "side_0"))
    sizes = {"user": USERS, "author": AUTHORS, "item": ITEMS}
    spec = DatasetSpec(
        name="random",
        source="random numbers",
        licence="none",
        partitions=8,
        timezone="UTC",
        behaviours=BEHAVIOURS,
        applies={behaviour: ("video", "live") for behaviour in BEHAVIOURS},
        candidates=("video", "live"),
        side=side,
        dense=tuple(DenseFeature(f"dense_{k}", "item") for k in range(8)),
        statistics=keys,
        ids={name: IdSpace(count, count - 1) for name, count in sizes.items()},
        span_ms=(START_MS, START_MS + DAYS * 24 * HOUR_MS),
        rows=rows,
    )
    request = START_MS + np.sort(rng.integers(0, DAYS * 24 * HOUR_MS, rows))
    shown = rng.integers(0, 100, (rows, len(keys), 1))
    counts = np.concatenate([shown, rng.binomial(shown, 0.2, (rows, len(keys), len(BEHAVIOURS)))], axis=2)
    columns: Rows = {
        "visit_id": np.arange(rows),
        **{f"{name}_id": rng.integers(0, count, rows) for name, count in sizes.items()},
        "domain": rng.integers(0, 2, rows).astype(np.uint8),
        "kind": np.full(rows, 4, np.uint8),
        "request_ms": request,
        "emit_ms": request + rng.integers(0, HOUR_MS // 4, rows),
        "side": np.stack([rng.integers(0, feature.rows, rows, np.int32) for feature in side], axis=1),
        "dense": rng.standard_normal((rows, 8), np.float32),
        "stat": counts.reshape(rows, -1).astype(np.float32),
        "label": (rng.random((rows, len(BEHAVIOURS))) < 0.1).astype(np.uint8),
        "mask": np.ones((rows, len(BEHAVIOURS)), np.uint8),
    }
    write_rows(path, spec, columns)
    (path / FOLDER).mkdir()
    writer = HistoryWriter(path / FOLDER)
    owner = partition_of(np.arange(USERS), spec.partitions)
    for partition in range(spec.partitions):
        user = np.repeat(np.flatnonzero(owner == partition), 150)
        began = START_MS - rng.integers(HOUR_MS, 30 * 24 * HOUR_MS, len(user))
        writer.append(
            {
                "user_id": user,
                "domain": rng.integers(0, 2, len(user)).astype(np.uint8),
                "item_id": rng.integers(0, ITEMS, len(user)),
                "author_id": rng.integers(0, AUTHORS, len(user)),
                "request_ms": began,
                "play_ms": rng.integers(0, 60_000, len(user)),
                "bits": rng.integers(0, 1 << len(BEHAVIOURS), len(user), np.int32),
                "known_ms": began + 60_000,
            }
        )
    writer.close()
    (path / "dataset.json").write_text(spec.to_json())


def open_workload(path: str | Path, features: FeatureConfig, behaviours: Sequence[str], shuffle_ms: int) -> Workload:
    """Open a dataset and fit its features on all rows."""
    spec = DatasetSpec.load(path)
    store, histories, selection = RowStore(path, spec), Histories(path, spec), Selection()
    fitted = fit_features(spec, store, histories, features, selection)
    return Workload(spec, store, histories, FeatureMap(spec, features, fitted, behaviours), selection, shuffle_ms)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(workload: Workload, batch_size: int, workers: int) -> dict[str, float]:
    """Load all rows once; return the rates."""
    wall, cpu, rows, ids = time.perf_counter(), cpu_seconds(), 0, 0
    for batch in workload.loader(batch_size, workers):
        rows += batch.rows
        ids += sum(keyed.values().numel() for keyed in batch.ids)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return {
        "workers": workers,
        "rows": rows,
        "ids_per_row": ids / rows,
        "rows_per_second": rows / wall,
        "rows_per_cpu_second": rows / cpu,
    }


class Stopwatch:
    """CPU time by stage; the time of a stage inside another one counts once."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, stage: str, function: Callable) -> Callable:
        """Return a function that adds its time to a stage."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                spent = time.process_time() - begin
                self.seconds[stage] += spent - self._inner.pop()
                self._inner[-1] += spent

        return call


def stage_shares(workload: Workload, batch_size: int) -> dict[str, float]:
    """Return the share of each stage in the CPU time, without workers."""
    watch = Stopwatch()
    stages = {
        "read and decode records": (RowStore, "read"),
        "gather rows": (BlockReader, "gather"),
        "histories": (Histories, "latest"),
        "ids and dense inputs": (FeatureMap, "pack"),
        "plan blocks": (ReadPlan, "_blocks"),
    }
    originals = {stage: getattr(owner, name) for stage, (owner, name) in stages.items()}
    try:
        for stage, (owner, name) in stages.items():
            setattr(owner, name, watch.timed(stage, originals[stage]))
        begin = time.process_time()
        for _ in workload.loader(batch_size, workers=0):
            pass
        total = time.process_time() - begin
    finally:
        for stage, (owner, name) in stages.items():
            setattr(owner, name, originals[stage])
    shares = {stage: watch.seconds[stage] / total for stage in stages}
    return {**shares, REST: 1 - sum(shares.values())}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.loader", __doc__)
    parser.add_argument("--config", help="job file whose dataset and features are read instead of random numbers")
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the random dataset (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes (default: 0 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.config:
            job = load_config(options.config)
            workload = open_workload(
                job.data.path, job.features, job.data.behaviours, round(job.data.shuffle_minutes * 60_000)
            )
        else:
            random_dataset(Path(scratch) / "random", options.rows)
            workload = open_workload(Path(scratch) / "random", FeatureConfig(), (), HOUR_MS)
        runs = [
            measure(workload, options.batch, workers) for _ in range(options.repeats) for workers in options.workers
        ]
        shares = stage_shares(workload, options.batch)

    best = {workers: best_of([run for run in runs if run["workers"] == workers]) for workers in options.workers}
    print(f"{runs[0]['rows']} rows, {runs[0]['ids_per_row']:.0f} ids a row, batches of {options.batch}\n")
    print("| workers | rows/s | rows per CPU second |")
    print("|---:|---:|---:|")
    for workers, run in best.items():
        print(f"| {workers} | {run['rows_per_second']:,.0f} | {run['rows_per_cpu_second']:,.0f} |")
    print("\n| stage | share of CPU time |")
    print("|---|---:|")
    for stage, share in shares.items():
        print(f"| {stage} | {share:.1%} |")
    spread = {
        str(workers): spread_of([run for run in runs if run["workers"] == workers]) for workers in options.workers
    }
    write_result(options.out, {"best": list(best.values()), "spread": spread, "runs": runs, "shares": shares})


if __name__ == "__main__":
    main()
