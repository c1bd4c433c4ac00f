"""Measure the rows a second that training learns from, beside peers on the same rows, and what each has learnt.

    python -m benchmarks.speed.throughput --out benchmarks/results/throughput.json
    python -m benchmarks.speed.throughput --rechub-python VENV/bin/python --fuxictr-python VENV/bin/python
    python -m benchmarks.speed.throughput --setups 1x1 --systems limelight-fp32 pytorch-sparse --scale 64   # in seconds
    python -m benchmarks.speed.throughput --out throughput_gpu.json    # on a machine with GPUs

PLE and DIN on 131,072 rows: 1M users, 100k authors, 1M items, dimension 16; hour (24), tag (1,000) and city (500); 8
dense values; one author and one item sequence of 50, each with its own DIN of [64, 16]; two-layer PLE (2 experts per
task and 2 shared, [256, 128] then [128, 64]), 3 towers of [128, 64]; Adagrad .01 on the tables, Adam .004 on the dense
network; global batch 2,048. One epoch; then AUC on held-out rows, so that nobody is fast by learning nothing.

Limelight reads shards and histories and computes AUC and GAUC as it trains. Its peers get arrays in memory and compute
no metric. ``pytorch`` and ``pytorch-sparse`` are a plain loop (``benchmarks/speed/peers/pytorch.py``); torch-rechub and
FuxiCTR come from PyPI, each installed in a virtual environment of its own, whose Python is named here. Their files in
``benchmarks/speed/peers/`` say where their models differ; they have one process, so they have no set-up with ranks.

On a machine with GPUs all systems train there, unless ``--device cpu``: a rank has a GPU of its own, loaders have
worker processes and page-locked memory, the step and the number of rows are larger, and the clock is read when the
device has done its work. The plain loop then keeps its rows in the device's memory. Products of the device in each
precision are measured just before each run, too.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from trainer.data.features.history_sequences import Searched
from trainer.data.features.packed_batch import BatchLayout, PackedBatch
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import RowStore
from trainer.data.loading.loader import Loader
from trainer.engine.hybrid_engine import DenseOptimizer, HybridEngine, StepResult, TableOptimizer
from trainer.engine.step_loss import BehaviourLoss
from trainer.ranking.training_state import TrainingState
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.phase_timer import PHASES, PhaseSeconds

SHORT = ("--rows", "24576", "--repeats", "1", "--setups", "1x1", "2x1")

BATCH = 2048
FLOP_PER_ROW = 8.4e6
"""Forward and backward of the work as written down above, without shortcuts."""
GPU_BATCH, GPU_ROWS = 8192, 8 * ROWS
"""Rows of a step and of the training on GPUs, which a step of 2,048 would leave idle most of the time."""
WARM_UP_STEPS = 4
DEEPSPEED = {
    "fp32": "configs/deepspeed/zero0.json",
    "tf32": "configs/deepspeed/zero0.json",
    "bf16": "configs/deepspeed/zero1_bf16.json",
}
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
        precision: of its products.
        gpus: it can train on several GPUs.
    """

    program: str
    mode: str
    python: str = ""
    ranks: bool = True
    precision: str = "fp32"
    gpus: bool = True


SYSTEMS = {
    "limelight-fp32": ThroughputSystem("", "fp32"),
    "limelight-tf32": ThroughputSystem("", "tf32", precision="tf32"),
    "limelight-bf16": ThroughputSystem("", "bf16", precision="bf16"),
    "pytorch": ThroughputSystem("pytorch.py", "dense"),
    # NCCL has no sum of sparse gradients over ranks.
    "pytorch-sparse": ThroughputSystem("pytorch.py", "sparse", gpus=False),
    "pytorch-sparse-tf32": ThroughputSystem("pytorch.py", "sparse-tf32", precision="tf32", gpus=False),
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

    def prepare(self, histories: Histories, space: Searched | None = None) -> None:
        """Do nothing: there is nothing to compile or to look up before workers are forked."""

    def pack(
        self, rows: Rows, histories: Histories, as_of_ms: np.ndarray, space: Searched | None = None
    ) -> PackedBatch:
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


def make_loader(path: Path, features: WorkloadFeatures, world: World, batch_size: int, workers: int = 0) -> Loader:
    """Return a loader of a dataset's rows on one rank, ``batch_size`` at a time, by ``workers`` processes."""
    return Loader(
        RowStore(path, features.spec),
        Histories(path, features.spec),
        features,
        rank=world.rank,
        world=world.size,
        batch_size=batch_size,
        seed=1,
        shuffle_ms=HOUR_MS // 8,
        workers=workers,
        pin_memory=world.device.type == "cuda",
    )


def train_rank(path: Path, precision: str, batch_size: int, workers: int, out: Path) -> None:
    """Train on one rank and predict the held-out rows; the first rank writes the result."""
    with World.join("auto") as world:
        own = batch_size // world.size
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        features = WorkloadFeatures(DatasetSpec.load(path / "train"))
        engine = make_engine(features, make_ranker(features), precision, own, world.device)
        loader = make_loader(path / "train", features, world, own, workers)
        state = TrainingState.at_start(BEHAVIOURS)
        laps: list[PhaseSeconds] = []
        rows, started = 0, 0.0
        with state.recording(engine, world):
            for step, result in enumerate(engine.steps(iter(loader))):
                state.advance(result)
                state.when_read(partial(_predicted, state, result))
                if step >= WARM_UP_STEPS:
                    rows += result.rows_global
                    laps.append(result.laps)
                elif step == WARM_UP_STEPS - 1:
                    started = clock(world.device)
            state.settle()
        state.progressive.compute()
        elapsed = clock(world.device) - started
        seconds = {phase: sum(of_step[phase] for of_step in map(PhaseSeconds.total, laps)) for phase in PHASES}
        held_out = WorkloadFeatures(DatasetSpec.load(path / "held_out"))
        predicted = engine.predict(iter(make_loader(path / "held_out", held_out, world, own)))
        probability = _in_order([(batch.visit_id, torch.sigmoid(logits)) for batch, logits in predicted], world)
        if world.rank == 0:
            np.savez(out, rows=rows, seconds=elapsed, probability=probability, behaviours=np.array(BEHAVIOURS))
            total = sum(seconds.values())
            shares = {phase: value / total for phase, value in seconds.items()}
            write_json(out.with_suffix(".json"), {"shares": shares, "plan": engine.plan})
        engine.close()


def _predicted(state: TrainingState, result: StepResult) -> None:
    """Add the rows of a step to the progressive metrics."""
    values = result.values
    state.predicted(values.user_id, values.logits, values.label, values.mask)


def clock(device: torch.device) -> float:
    """Return the seconds of a clock when the device has done all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def device_rates(device: torch.device, size: int = 8192) -> dict[str, Any]:
    """Return the rates of one device: a matrix product in each precision (GFLOP/s), and a copy (GB/s).

    Args:
        device: the device.
        size: of the matrices; too small ones do not fill a GPU.
    """
    before = torch.get_float32_matmul_precision()
    products, source = dict[str, float](), torch.empty(size * size * 4, device=device)
    target = torch.empty_like(source)
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        matrix = torch.randn(size, size, device=device).to(dtype)
        seconds = _shortest(lambda matrix=matrix: matrix @ matrix, device)  # type: ignore[misc]
        products[precision] = 2 * size**3 / seconds / 1e9
    torch.set_float32_matmul_precision(before)
    copied = 2 * source.nbytes / _shortest(lambda: target.copy_(source), device) / 1e9
    return {"device_product_gflops": products, "device_copy_gb_per_second": copied}


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run of some work, the shortest of six."""
    seconds = []
    for _ in range(6):
        begin = clock(device)
        work()
        seconds.append(clock(device) - begin)
    return min(seconds)


def start(
    system: ThroughputSystem, python: str, path: Path, ranks: int, threads: int, batch_size: int, workers: int = 0
) -> Path:
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
        own = [str(path), system.mode, str(batch_size), str(workers), str(out)]
        program = ["-m", "benchmarks.speed.throughput", "--one", *own]
        command = [python, *launcher, *program]
    environment = safe_environment(os.environ)
    if python != sys.executable:
        # Its virtual environment finds its packages by itself, and none of ours.
        environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": str(threads)})
    return out


def measure(
    system: ThroughputSystem, python: str, path: Path, setup: str, batch_size: int, workers: int, on_gpu: bool
) -> dict[str, Any]:
    """Return rows per second and held-out AUC of one run, the machine's rates just before, and the load meanwhile."""
    ranks, threads = (int(number) for number in setup.split("x"))
    rates: dict[str, Any] = machine_rates(ranks * threads)
    if on_gpu:
        rates |= device_rates(torch.device("cuda"))
    before = MachineLoad.now()
    out = start(system, python, path, ranks, threads, batch_size, workers)
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


def _ranks_of(setup: str) -> int:
    """Return R of a set-up ``RxT``."""
    return int(setup.split("x")[0])


def summary(setup: str, system: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median and the spread of the runs of one system in one set-up.

    ``share_of_product_rate`` is of products on the CPU cores of the set-up; on GPUs, of those in the system's precision
    on all devices of the set-up.
    """
    rate = median_and_range([run["rows_per_second"] for run in runs])
    product = statistics.median(run["product_gflops"] for run in runs)
    if "device_product_gflops" in runs[0]:
        precision = SYSTEMS[system].precision
        of_device = statistics.median(run["device_product_gflops"][precision] for run in runs)
        product = _ranks_of(setup) * of_device
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


@dataclass(frozen=True)
class ThroughputSettings:
    """Settings of a machine; see the options of the same names."""

    setups: tuple[str, ...]
    batch: int
    rows: int
    workers: int


def default_settings(gpus: int, cores: int) -> ThroughputSettings:
    """Return the settings of a machine with some GPUs, or none, and processor cores."""
    if not gpus:
        return ThroughputSettings(("1x1", "1x2", "2x1"), BATCH, ROWS, 0)
    own = max(1, cores // gpus)
    # A rank computes little on its cores, and its loader gathers rows.
    setups = tuple(f"{ranks}x{min(own, 4)}" for ranks in sorted({1, gpus}))
    return ThroughputSettings(setups, GPU_BATCH, GPU_ROWS, min(8, max(1, own - 1)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.throughput", __doc__)
    parser.add_argument(
        "--setups",
        nargs="+",
        metavar="RxT",
        help="ranks x threads (default: 1x1 1x2 2x1; with GPUs, one of them and all of them)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu"], default="auto", help="GPUs if there are any, or none (default: auto)"
    )
    parser.add_argument("--batch", type=int, help=f"rows of a step (default: {BATCH}; with GPUs {GPU_BATCH})")
    parser.add_argument(
        "--workers", type=int, help="loader processes of a rank of Limelight (default: 0; with GPUs, by its cores)"
    )
    parser.add_argument(
        "--systems", nargs="+", choices=list(SYSTEMS), help="(default: Limelight, and every peer whose Python is known)"
    )
    parser.add_argument("--rechub-python", metavar="PATH", default="", help="Python with torch-rechub")
    parser.add_argument("--fuxictr-python", metavar="PATH", default="", help="Python with fuxictr")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each (default: %(default)s)")
    parser.add_argument("--rows", type=int, help=f"training rows (default: {ROWS}; with GPUs {GPU_ROWS})")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide rows, ids and batch by this, to try it (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        path, precision, batch_size, workers, out = options.one
        train_rank(Path(path), precision, int(batch_size), int(workers), Path(out))
        return
    if options.device == "cpu":
        # Also for the processes that are started.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    settings = default_settings(gpus, len(os.sched_getaffinity(0)))
    setups = options.setups or settings.setups
    pythons = {
        name: getattr(options, system.python) if system.python else sys.executable for name, system in SYSTEMS.items()
    }
    chosen = options.systems or [
        name for name, python in pythons.items() if python and (gpus or SYSTEMS[name].precision != "tf32")
    ]
    if gpus and (larger := [setup for setup in setups if _ranks_of(setup) > gpus]):
        parser.error(f"--setups {larger[0]}: there are {gpus} GPUs, one for each rank")
    for name in chosen:
        if not pythons[name]:
            parser.error(f"{name} needs --{SYSTEMS[name].python.replace('_', '-')} PATH, a Python that has it")
    of_step = settings.batch if options.batch is None else options.batch
    of_all = settings.rows if options.rows is None else options.rows
    workers = settings.workers if options.workers is None else options.workers
    batch, rows = of_step // options.scale, of_all // options.scale
    if rows // batch <= WARM_UP_STEPS:
        parser.error(f"--rows {of_all}: give more than {WARM_UP_STEPS * of_step:,}, the rows of the warm-up")
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
            for setup in setups:
                for name in chosen:
                    system = SYSTEMS[name]
                    if _ranks_of(setup) == 1 or (system.ranks and (system.gpus or not gpus)):
                        run = measure(system, pythons[name], path, setup, batch, workers, gpus > 0)
                        print(f"{setup} {name}: {run['rows_per_second']:,.0f} rows/s", flush=True)
                        runs.setdefault((setup, name), []).append(run)
    held_out = parts["held_out"]
    best = {
        name: float(roc_auc_score(held_out.label[:, k], held_out.probability[:, k]))
        for k, name in enumerate(BEHAVIOURS)
    }
    results = [summary(setup, name, runs[setup, name]) for setup in setups for name in chosen if (setup, name) in runs]
    print("\n" + table(results))
    print("best possible AUC: " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))
    used = {"rows": rows, "batch": batch, "scale": options.scale, "repeats": options.repeats, "workers": workers}
    used["device"] = torch.cuda.get_device_name() if gpus else "cpu"
    write_result(
        options.out, {"results": results, "best_possible_auc": best, "settings": used}, max(map(_ranks_of, setups))
    )


if __name__ == "__main__":
    main()
