"""Measure the rows a second that training learns from: the peers' workload, end to end.

    python -m benchmarks.speed.throughput --precisions fp32 --out benchmarks/results/throughput.json
    python -m benchmarks.speed.throughput --precisions bf16 --out benchmarks/results/throughput_bf16.json
    python -m benchmarks.speed.throughput --setups 2x1 --precisions fp32 --scale 64    # tries it in seconds

PLE and DIN on 131,072 rows: 1M users, 100k authors, 1M items, dimension 16; hour (24), tag (1,000) and city (500); 8
dense values; one author and one item sequence of 50, each with its own DIN of [64, 16]; two-layer PLE (2 experts per
task and 2 shared, [256, 128] then [128, 64]), 3 towers of [128, 64]; Adagrad .01 on the tables, Adam .001 on the dense
network; AUC and GAUC; global batch 2,048. Rows are read from shards and histories, as in training.

A set-up ``RxT`` is R ranks of T threads. The machine's own rates, a matrix product and a copy on as many threads, are
measured in the same run, since machines differ and are noisy. Set-ups are interleaved ``--repeats`` times, and the best
run of each counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import make_parser, run_ranks, write_result
from benchmarks.speed.loader import HOUR_MS, START_MS
from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from trainer.data.features.feature_map import HistorySequence
from trainer.data.features.history_sequences import Space
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.format.history import FOLDER, Histories, HistoryWriter
from trainer.data.format.schema import DatasetSpec, DenseFeature, IdSpace, Rows, SideFeature, partition_of
from trainer.data.format.shards import RowStore, write_rows
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.metrics.behaviour_metrics import ProgressiveMetrics
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.phase_timer import PHASES

ROWS, USERS, AUTHORS, ITEMS, DIM, LENGTH, DENSE = 131_072, 1_000_000, 100_000, 1_000_000, 16, 50, 8
BATCH = 2048
BEHAVIOURS = ("click", "like", "gift")
SIDE = (("hour", 24), ("tag", 1000), ("city", 500))
PEER_ROWS_PER_SECOND = {"1x1": 5132, "1x2": 6540, "2x1": 7448}
"""TorchEasyRec on the same workload, its best settings and its better run of two, on 2 cores of another machine."""
FLOP_PER_ROW = 8.4e6
"""Forward and backward of the work as written down above, without shortcuts."""
WARM_UP_STEPS = 8
DEEPSPEED = {"fp32": "configs/deepspeed/zero0.json", "bf16": "configs/deepspeed/zero1_bf16.json"}
"""The peer replicates its dense network, as ZeRO 0 does; bf16 needs ZeRO's fp32 master copy."""


def write_dataset(path: Path, scale: int = 1) -> None:
    """Write random rows, each of a user with 50 earlier videos.

    Args:
        path: directory of the dataset.
        scale: rows and ids are fewer by this factor.
    """
    rng = np.random.default_rng(0)
    n, users, authors, items = (number // scale for number in (ROWS, USERS, AUTHORS, ITEMS))
    spec = DatasetSpec(
        name="throughput",
        source="random numbers",
        licence="none",
        partitions=4,
        timezone="UTC",
        behaviours=BEHAVIOURS,
        applies={behaviour: ("video",) for behaviour in BEHAVIOURS},
        candidates=("video",),
        side=tuple(SideFeature(name, "context", rows) for name, rows in SIDE),
        dense=tuple(DenseFeature(f"dense_{k}", "context") for k in range(DENSE)),
        ids={
            "user": IdSpace(users, users - 1),
            "author": IdSpace(authors, authors - 1),
            "item": IdSpace(items, items - 1),
        },
        span_ms=(START_MS, START_MS + HOUR_MS),
        rows=n,
    )
    user = rng.integers(0, users, n)
    request = np.sort(START_MS + rng.integers(0, HOUR_MS, n))
    columns: Rows = {
        "visit_id": np.arange(n),
        "user_id": user,
        "author_id": rng.integers(0, authors, n),
        "item_id": rng.integers(0, items, n),
        "domain": np.zeros(n, np.uint8),
        "kind": np.full(n, 4, np.uint8),
        "request_ms": request,
        "emit_ms": request,
        "side": np.stack([rng.integers(0, rows, n, np.int32) for _, rows in SIDE], axis=1),
        "dense": rng.standard_normal((n, DENSE), np.float32),
        "stat": np.empty((n, 0), np.float32),
        "label": (rng.random((n, 3)) < 0.2).astype(np.uint8),
        "mask": np.ones((n, 3), np.uint8),
    }
    write_rows(path, spec, columns)
    (path / FOLDER).mkdir()
    writer = HistoryWriter(path / FOLDER)
    known = np.unique(user)
    partition_of_user = partition_of(known, spec.partitions)
    for partition in range(spec.partitions):
        owner = np.repeat(known[partition_of_user == partition], LENGTH)
        began = START_MS - rng.integers(HOUR_MS, 24 * HOUR_MS, len(owner))
        writer.append(
            {
                "user_id": owner,
                "domain": np.zeros(len(owner), np.uint8),
                "item_id": rng.integers(0, items, len(owner)),
                "author_id": rng.integers(0, authors, len(owner)),
                "request_ms": began,
                "play_ms": np.full(len(owner), 10_000),
                "bits": np.zeros(len(owner), np.int32),
                "known_ms": began,
            }
        )
    writer.close()
    (path / "dataset.json").write_text(spec.to_json())


class WorkloadFeatures:
    """The peers' inputs: ids as they are, and the two sequences without contexts.

    A loader takes it in place of a :class:`trainer.data.features.feature_map.FeatureMap`, which would read both
    sequences as one.
    """

    lookups = (
        Lookup("user", "user", 1),
        Lookup("author", "author", 1),
        Lookup("item", "item", 1),
        Lookup("side", "side", len(SIDE)),
        Lookup("past_author", "author", None),
        Lookup("past_item", "item", None),
    )
    sequences = (
        HistorySequence("authors", ("past_author",), ("author",), LENGTH),
        HistorySequence("items", ("past_item",), ("item",), LENGTH),
    )

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        rows = {name: space.count for name, space in spec.ids.items()} | {"side": sum(rows for _, rows in SIDE)}
        self.tables = tuple(Table(name, count, DIM) for name, count in rows.items())
        self.layout = BatchLayout((tuple(lookup.name for lookup in self.lookups),), DENSE, len(BEHAVIOURS))
        self._offsets = np.cumsum([0] + [rows for _, rows in SIDE[:-1]])

    def prepare(self, histories: Histories, space: Space | None = None) -> None:
        """Do nothing: there is nothing to compile or to look up before workers are forked."""

    def pack(self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Space | None = None) -> PackedBatch:
        """Return the batch of some rows, see ``trainer.data.features.feature_map.FeatureMap.pack``."""
        n = len(rows["visit_id"])
        past = histories.latest(rows["user_id"], as_of_ms, domain=0, length=LENGTH)
        one = np.ones(n, np.int64)
        parts = [rows["user_id"], rows["author_id"], rows["item_id"], (rows["side"] + self._offsets).reshape(-1)]
        parts += [past.author_id, past.item_id, one, one, one, one * len(SIDE), past.lengths, past.lengths]
        parts += [rows["user_id"], rows["visit_id"], rows["request_ms"]]
        floats = [rows["dense"].reshape(-1), rows["label"].reshape(-1), rows["mask"].reshape(-1)]
        counts = {key: len(part) for key, part in zip(self.layout.keys[0], parts, strict=False)}
        return PackedBatch(
            torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False)),
            torch.from_numpy(np.concatenate(floats).astype(np.float32, copy=False)),
            n,
            counts,
        )


def train_rank(path: Path, precision: str, batch_size: int, out: Path) -> None:
    """Train on one rank of a measurement; the first rank writes the result."""
    with World.join("auto") as world:
        spec = DatasetSpec.load(path)
        features = WorkloadFeatures(spec)
        torch.manual_seed(1)
        ranker = Ranker(
            behaviours=len(BEHAVIOURS),
            lookups=features.lookups,
            dims={table.name: table.dim for table in features.tables},
            n_dense=DENSE,
            sequences=features.sequences,
            kind="ple",
            task_experts=2,
            shared_experts=2,
            expert_layers=((256, 128), (128, 64)),
            tower=(128, 64),
            attention=(64, 16),
        )
        engine = HybridEngine(
            features.tables,
            features.lookups,
            ranker,
            table_optimizer=TableOptimizer("adagrad", 0.01, 1e-8),
            dense_optimizer=DenseOptimizer(1e-3, 0.0, (0.9, 0.999)),
            deepspeed=json.loads(Path(DEEPSPEED[precision]).read_text()) | {"gradient_clipping": 0.0},
            loss=BehaviourLoss(torch.ones(len(BEHAVIOURS))),
            batch_size=batch_size // world.size,
            device=world.device,
            seed=1,
            overlap=True,
        )
        loader = Loader(
            RowStore(path, spec),
            Histories(path, spec),
            features,
            rank=world.rank,
            world=world.size,
            batch_size=batch_size // world.size,
            seed=1,
            shuffle_ms=HOUR_MS // 8,
            workers=0,
        )
        metrics = ProgressiveMetrics(BEHAVIOURS)
        seconds = dict.fromkeys(PHASES, 0.0)
        rows, started = 0, 0.0
        for step, result in enumerate(engine.steps(iter(loader))):
            batch = result.batch
            metrics.update(batch.user_id, torch.sigmoid(result.logits), batch.label, batch.mask)
            if step >= WARM_UP_STEPS:
                rows += result.rows_global
                for phase in PHASES:
                    seconds[phase] += result.seconds[phase]
            elif step == WARM_UP_STEPS - 1:
                started = time.perf_counter()
        metrics.compute()
        elapsed = time.perf_counter() - started
        if world.rank == 0:
            total = sum(seconds.values())
            shares = {phase: value / total for phase, value in seconds.items()}
            write_json(out, {"rows_per_second": rows / elapsed, "rows": rows, "shares": shares, "plan": engine.plan})
        engine.close()


def machine_rates(threads: int, precision: str) -> dict[str, float]:
    """Return the rates of a matrix product (GFLOP/s) and of a copy (GB/s) on some threads, the best of six tries."""
    torch.set_num_threads(threads)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2048, 2048).to(kind), torch.randn(2048, 2048).to(kind)
    source, target = torch.empty(1 << 26), torch.empty(1 << 26)
    product = copy = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        middle = time.perf_counter()
        target.copy_(source)
        product, copy = min(product, middle - start), min(copy, time.perf_counter() - middle)
    return {"product_gflops": 2 * 2048**3 / product / 1e9, "copy_gb_per_second": 2 * source.numel() * 4 / copy / 1e9}


def measure(path: Path, setup: str, precision: str, batch_size: int) -> dict[str, Any]:
    """Return the rows per second of one set-up, in processes of its own, and the machine's rates just before."""
    ranks, threads = (int(number) for number in setup.split("x"))
    rates = machine_rates(ranks * threads, precision)
    arguments = ["--one", path, precision, batch_size]
    result = run_ranks("benchmarks.speed.throughput", arguments, ranks, threads, cpu_only=False)
    floor = rates["product_gflops"] * 1e9 / FLOP_PER_ROW
    return {
        "setup": setup,
        "precision": precision,
        **result,
        **rates,
        "share_of_product_rate": result["rows_per_second"] / floor,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.throughput", __doc__)
    parser.add_argument(
        "--setups", nargs="+", default=["1x1", "1x2", "2x1"], metavar="RxT", help="ranks x threads (default: all three)"
    )
    parser.add_argument(
        "--precisions", nargs="+", default=list(DEEPSPEED), choices=list(DEEPSPEED), help="of the dense network"
    )
    parser.add_argument("--repeats", type=int, default=2, help="interleaved runs of each (default: %(default)s)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide rows, ids and batch by this, to try it (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        path, precision, batch_size, out = options.one
        train_rank(Path(path), precision, int(batch_size), Path(out))
        return
    with tempfile.TemporaryDirectory() as scratch:
        dataset = Path(scratch) / "dataset"
        dataset.mkdir()
        write_dataset(dataset, options.scale)
        runs = [
            measure(dataset, setup, precision, BATCH // options.scale)
            for _ in range(options.repeats)
            for setup in options.setups
            for precision in options.precisions
        ]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        key = (run["setup"], run["precision"])
        if key not in best or run["rows_per_second"] > best[key]["rows_per_second"]:
            best[key] = run
    print(
        "\n| ranks x threads | precision | rows/s | peer | product GFLOP/s | copy GB/s | of product rate | "
        + " | ".join(PHASES)
        + " |"
    )
    print("|---|---|---:|---:|---:|---:|---:|" + "---:|" * len(PHASES))
    for (setup, precision), run in best.items():
        peer = PEER_ROWS_PER_SECOND.get(setup, 0)
        shares = " | ".join(f"{run['shares'][phase]:.0%}" for phase in PHASES)
        print(
            f"| {setup} | {precision} | {run['rows_per_second']:,.0f} | {peer:,} | {run['product_gflops']:.0f} | "
            f"{run['copy_gb_per_second']:.0f} | {run['share_of_product_rate']:.0%} | {shares} |"
        )
    write_result(options.out, {"best": list(best.values()), "runs": runs}, ranks=2)


if __name__ == "__main__":
    main()
