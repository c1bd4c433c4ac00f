"""Measure the rows a second that training learns from, beside peers on the same rows, and what each has learnt.

    python -m benchmarks.speed.throughput --out benchmarks/results/throughput.json
    python -m benchmarks.speed.throughput --rechub-python VENV/bin/python --fuxictr-python VENV/bin/python
    python -m benchmarks.speed.throughput --setups 1x1 --systems limelight-fp32 pytorch-sparse --scale 64   # in seconds

PLE and DIN on 131,072 rows: 1M users, 100k authors, 1M items, dimension 16; hour (24), tag (1,000) and city (500); 8
dense values; one author and one item sequence of 50, each with its own DIN of [64, 16]; two-layer PLE (2 experts per
task and 2 shared, [256, 128] then [128, 64]), 3 towers of [128, 64]; Adagrad .01 on the tables, Adam .001 on the dense
network; global batch 2,048. One epoch; then AUC on held-out rows, so that nobody is fast by learning nothing.

Limelight reads shards and histories and computes AUC and GAUC as it trains. Its peers get arrays in memory and compute
no metric. ``pytorch`` and ``pytorch-sparse`` are a plain loop (``benchmarks/speed/peers/pytorch.py``); torch-rechub and
FuxiCTR come from PyPI, each installed in a virtual environment of its own, whose Python is named here. Their files in
``benchmarks/speed/peers/`` say where their models differ; they have one process, so they have no set-up with ranks.

A set-up ``RxT`` is R ranks of T threads. All systems of a set-up run one after another, ``--repeats`` times around; the
median counts, and the least and the largest show the spread. The machine's own rates, a matrix product and a copy on as
many threads, are measured just before each run, since machines differ and are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.measure import MachineLoad, load_facts, make_parser, median_and_range, write_result
from benchmarks.speed.loader import HOUR_MS
from benchmarks.speed.workload import (
    ATTENTION,
    BEHAVIOURS,
    DENSE,
    DENSE_RATE,
    DIM,
    EXPERT_LAYERS,
    HELD_OUT,
    LENGTH,
    ROWS,
    SHARED_EXPERTS,
    SIDE,
    TABLE_RATE,
    TASK_EXPERTS,
    TOWER,
    make_rows,
    write_arrays,
    write_dataset,
)
from launch.python_path import safe_environment
from modules.embeddings import Lookup, Table
from modules.ranker import Ranker
from trainer.console.text_table import text_table
from trainer.data.features.feature_map import HistorySequence
from trainer.data.features.history_sequences import Space
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import RowStore
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.metrics.behaviour_metrics import ProgressiveMetrics
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.phase_timer import PHASES

SHORT = ("--rows", "24576", "--repeats", "1", "--setups", "1x1", "2x1")

BATCH = 2048
FLOP_PER_ROW = 8.4e6
"""Forward and backward of the work as written down above, without shortcuts."""
WARM_UP_STEPS = 4
DEEPSPEED = {"fp32": "configs/deepspeed/zero0.json", "bf16": "configs/deepspeed/zero1_bf16.json"}
"""The peers replicate their dense networks, as ZeRO 0 does; bf16 needs ZeRO's fp32 master copy."""

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class ThroughputSystem:
    """A system whose training is measured.

    Attributes:
        program: file of ``benchmarks/speed/peers``; "" for Limelight.
        mode: argument of the program; precision of Limelight's dense network.
        python: option that names the Python of its virtual environment; "" for this Python.
        ranks: it can train on several ranks.
    """

    program: str
    mode: str
    python: str = ""
    ranks: bool = True


SYSTEMS = {
    "limelight-fp32": ThroughputSystem("", "fp32"),
    "limelight-bf16": ThroughputSystem("", "bf16"),
    "pytorch": ThroughputSystem("pytorch.py", "dense"),
    "pytorch-sparse": ThroughputSystem("pytorch.py", "sparse"),
    "rechub-ple": ThroughputSystem("rechub.py", "ple", "rechub_python", ranks=False),
    "rechub-din": ThroughputSystem("rechub.py", "din", "rechub_python", ranks=False),
    "fuxictr": ThroughputSystem("fuxi.py", "ple", "fuxictr_python", ranks=False),
}


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


def make_ranker(features: WorkloadFeatures) -> Ranker:
    """Return the dense network of the workload."""
    torch.manual_seed(1)
    return Ranker(
        behaviours=len(BEHAVIOURS),
        lookups=features.lookups,
        dims={table.name: table.dim for table in features.tables},
        n_dense=DENSE,
        sequences=features.sequences,
        kind="ple",
        task_experts=TASK_EXPERTS,
        shared_experts=SHARED_EXPERTS,
        expert_layers=EXPERT_LAYERS,
        tower=TOWER,
        attention=ATTENTION,
    )


def make_engine(
    features: WorkloadFeatures, ranker: Ranker, precision: str, batch_size: int, device: torch.device
) -> HybridEngine:
    """Return the engine of the workload.

    Args:
        features: its inputs.
        ranker: its dense network.
        precision: a key of :data:`DEEPSPEED`.
        batch_size: rows of a rank in a step.
        device: device of the rank.
    """
    return HybridEngine(
        features.tables,
        features.lookups,
        ranker,
        table_optimizer=TableOptimizer("adagrad", TABLE_RATE, 1e-8),
        dense_optimizer=DenseOptimizer(DENSE_RATE, 0.0, (0.9, 0.999)),
        deepspeed=json.loads(Path(DEEPSPEED[precision]).read_text()) | {"gradient_clipping": 0.0},
        loss=BehaviourLoss(torch.ones(len(BEHAVIOURS))),
        batch_size=batch_size,
        device=device,
        seed=1,
        overlap=True,
    )


def make_loader(path: Path, features: WorkloadFeatures, world: World, batch_size: int) -> Loader:
    """Return a loader of a dataset's rows on one rank, ``batch_size`` at a time."""
    return Loader(
        RowStore(path, features.spec),
        Histories(path, features.spec),
        features,
        rank=world.rank,
        world=world.size,
        batch_size=batch_size,
        seed=1,
        shuffle_ms=HOUR_MS // 8,
        workers=0,
    )


def train_rank(path: Path, precision: str, batch_size: int, out: Path) -> None:
    """Train on one rank and predict the held-out rows; the first rank writes the result."""
    with World.join("auto") as world:
        own = batch_size // world.size
        features = WorkloadFeatures(DatasetSpec.load(path / "train"))
        engine = make_engine(features, make_ranker(features), precision, own, world.device)
        loader = make_loader(path / "train", features, world, own)
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
        held_out = WorkloadFeatures(DatasetSpec.load(path / "held_out"))
        predicted = engine.predict(iter(make_loader(path / "held_out", held_out, world, own)))
        probability = _in_order([(batch.visit_id, torch.sigmoid(logits)) for batch, logits in predicted], world)
        if world.rank == 0:
            np.savez(out, rows=rows, seconds=elapsed, probability=probability, behaviours=np.array(BEHAVIOURS))
            total = sum(seconds.values())
            shares = {phase: value / total for phase, value in seconds.items()}
            write_json(out.with_suffix(".json"), {"shares": shares, "plan": engine.plan})
        engine.close()


def _in_order(parts: Sequence[tuple[Tensor, Tensor]], world: World) -> np.ndarray:
    """Return the probabilities of all ranks in the order of the rows, whose numbers are their visits' ids."""
    row = torch.cat([rows for rows, _ in parts]).cpu()
    value = torch.cat([values for _, values in parts]).float().cpu()
    found: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(found, (row, value))
    order = torch.cat([rows for rows, _ in found]).argsort()
    return torch.cat([values for _, values in found])[order].numpy()


def machine_rates(threads: int) -> dict[str, float]:
    """Return the rates of a matrix product in fp32 and bf16 (GFLOP/s) and of a copy (GB/s), the best of six tries."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, target = torch.empty(1 << 26), torch.empty(1 << 26)
    matrices = {kind: torch.randn(2048, 2048).to(kind) for kind in (torch.float32, torch.bfloat16)}
    best: dict[str, float] = {}
    for _ in range(6):
        for kind, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            rate = 2 * 2048**3 / (time.perf_counter() - start) / 1e9
            key = "product_gflops" if kind == torch.float32 else "bf16_product_gflops"
            best[key] = max(best.get(key, 0.0), rate)
        start = time.perf_counter()
        target.copy_(source)
        rate = 2 * source.numel() * 4 / (time.perf_counter() - start) / 1e9
        best["copy_gb_per_second"] = max(best.get("copy_gb_per_second", 0.0), rate)
    torch.set_num_threads(before)
    return best


def start(system: ThroughputSystem, python: str, path: Path, ranks: int, threads: int, batch_size: int) -> Path:
    """Train a system in processes of its own and return the file that its first rank has written.

    Raises:
        subprocess.CalledProcessError: a process failed.
    """
    out = path / "out.npz"
    out.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if system.program:
        program = [str(PEERS / system.program), system.mode, str(path), str(out)]
        command = [python, *(launcher if ranks > 1 else []), *program]
    else:
        program = ["-m", "benchmarks.speed.throughput", "--one", str(path), system.mode, str(batch_size), str(out)]
        command = [python, *launcher, *program]
    environment = safe_environment(os.environ)
    if python != sys.executable:
        # Its virtual environment finds its packages by itself, and none of ours.
        environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": str(threads)})
    return out


def measure(system: ThroughputSystem, python: str, path: Path, setup: str, batch_size: int) -> dict[str, Any]:
    """Return rows per second and held-out AUC of one run, the machine's rates just before, and the load meanwhile."""
    ranks, threads = (int(number) for number in setup.split("x"))
    rates = machine_rates(ranks * threads)
    before = MachineLoad.now()
    out = start(system, python, path, ranks, threads, batch_size)
    load = load_facts(before, MachineLoad.now())
    with np.load(out, allow_pickle=False) as found:
        rows, seconds, probability = int(found["rows"]), float(found["seconds"]), found["probability"]
        learnt = [str(name) for name in found["behaviours"]]
    with np.load(path / "held_out.npz", allow_pickle=False) as held_out:
        label = held_out["label"]
    auc = {name: float(roc_auc_score(label[:, k], probability[:, k])) for k, name in enumerate(learnt)}
    own = out.with_suffix(".json")
    facts = json.loads(own.read_text()) if not system.program else {}
    return {"rows": rows, "rows_per_second": rows / seconds, "auc": auc, **facts, **rates, **load}


def summary(setup: str, system: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median and the spread of the runs of one system in one set-up."""
    rate = median_and_range([run["rows_per_second"] for run in runs])
    product = statistics.median(run["product_gflops"] for run in runs)
    result = {
        "setup": setup,
        "system": system,
        "rows_per_second": rate,
        "auc": {name: statistics.median(run["auc"][name] for run in runs) for name in runs[0]["auc"]},
        "share_of_product_rate": rate["median"] * FLOP_PER_ROW / (product * 1e9),
    }
    if "shares" in runs[0]:
        result["shares"] = {phase: statistics.median(run["shares"][phase] for run in runs) for phase in PHASES}
    return {**result, "runs": list(runs)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a text table."""
    lines = []
    for result in results:
        rate, runs = result["rows_per_second"], result["runs"]
        load = max(run["cores_of_others"] for run in runs)
        lines.append(
            [
                result["setup"],
                result["system"],
                f"{rate['median']:,.0f}",
                f"{rate['least']:,.0f} to {rate['most']:,.0f}",
                f"{result['share_of_product_rate']:.0%}",
                *(f"{result['auc'][name]:.4f}" if name in result["auc"] else "-" for name in BEHAVIOURS),
                f"{load:.1f}",
            ]
        )
    header = ["set-up", "system", "rows/s", "spread", "of product rate"]
    return text_table([*header, *(f"AUC {name}" for name in BEHAVIOURS), "cores of others"], lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.throughput", __doc__)
    parser.add_argument(
        "--setups", nargs="+", default=["1x1", "1x2", "2x1"], metavar="RxT", help="ranks x threads (default: all three)"
    )
    parser.add_argument(
        "--systems", nargs="+", choices=list(SYSTEMS), help="(default: Limelight, and every peer whose Python is known)"
    )
    parser.add_argument("--rechub-python", metavar="PATH", default="", help="Python with torch-rechub")
    parser.add_argument("--fuxictr-python", metavar="PATH", default="", help="Python with fuxictr")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows (default: %(default)s)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide rows, ids and batch by this, to try it (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        path, precision, batch_size, out = options.one
        train_rank(Path(path), precision, int(batch_size), Path(out))
        return
    pythons = {
        name: getattr(options, system.python) if system.python else sys.executable for name, system in SYSTEMS.items()
    }
    chosen = options.systems or [name for name, python in pythons.items() if python]
    for name in chosen:
        if not pythons[name]:
            parser.error(f"{name} needs --{SYSTEMS[name].python.replace('_', '-')} PATH, a Python that has it")
    batch, rows = BATCH // options.scale, options.rows // options.scale
    if rows // batch <= WARM_UP_STEPS:
        parser.error(f"--rows {options.rows}: give more than {WARM_UP_STEPS * BATCH:,}, the rows of the warm-up")
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        parts = {
            "train": make_rows(rows, options.scale, seed=1),
            "held_out": make_rows(rows // HELD_OUT, options.scale, seed=2),
        }
        for name, of_part in parts.items():
            write_dataset(path / name, of_part, options.scale)
        write_arrays(path, parts, batch, options.scale, WARM_UP_STEPS)
        for _ in range(options.repeats):
            for setup in options.setups:
                for name in chosen:
                    if SYSTEMS[name].ranks or setup.startswith("1x"):
                        run = measure(SYSTEMS[name], pythons[name], path, setup, batch)
                        print(f"{setup} {name}: {run['rows_per_second']:,.0f} rows/s", flush=True)
                        runs.setdefault((setup, name), []).append(run)
    held_out = parts["held_out"]
    best = {
        name: float(roc_auc_score(held_out.label[:, k], held_out.probability[:, k]))
        for k, name in enumerate(BEHAVIOURS)
    }
    results = [
        summary(setup, name, runs[setup, name]) for setup in options.setups for name in chosen if (setup, name) in runs
    ]
    print("\n" + table(results))
    print("best possible AUC: " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))
    settings = {"rows": rows, "batch": batch, "scale": options.scale, "repeats": options.repeats}
    write_result(options.out, {"results": results, "best_possible_auc": best, "settings": settings}, ranks=2)


if __name__ == "__main__":
    main()
