"""Measure the rows a second that training learns from, beside peers on the same rows, and what each has learnt.

    python -m benchmarks.speed.throughput --out benchmarks/results/throughput.json
    python -m benchmarks.speed.throughput --rechub-python PYTHON --fuxictr-python PYTHON
    python -m benchmarks.speed.throughput --tzrec-python PYTHON     # beside TorchEasyRec, in both of its modes
    python -m benchmarks.speed.throughput --setups 1x1 --systems limelight-fp32 pytorch-sparse --scale 64   # in seconds
    python -m benchmarks.speed.throughput --out throughput_gpu.json    # on a machine with GPUs

PLE and DIN on 131,072 rows: 1M users, 100k authors, 1M items, dimension 16; hour (24), tag (1,000) and city (500); 8
dense values; one author and one item sequence of 50, each with its own DIN of [64, 16]; two-layer PLE (2 experts per
task and 2 shared, [256, 128] then [128, 64]), 3 towers of [128, 64]; Adagrad .01 on the tables, Adam .004 on the dense
network; global batch 2,048. One epoch; then AUC on held-out rows, so that nobody is fast by learning nothing.

Limelight reads shards and histories and computes AUC and GAUC as it trains. Its peers get arrays in memory and compute
no metric. ``pytorch`` and ``pytorch-sparse`` are a plain loop (``benchmarks/speed/peers/pytorch.py``); torch-rechub and
FuxiCTR come from PyPI, TorchEasyRec from its repository, each installed in a virtual environment of its own, whose
Python is named here. Their files in ``benchmarks/speed/peers/`` say where their models differ. torch-rechub and FuxiCTR
have one process, so they have no set-up with ranks. TorchEasyRec has two modes on a CPU: ``tzrec`` as it ships, and
``tzrec-sharded``; which one is faster depends on the machine.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.measure import MachineLoad, load_facts, make_parser, median_and_range, write_result
from benchmarks.speed.limelight_training import WARM_UP_STEPS, train_rank
from benchmarks.speed.machine_rates import device_rates, machine_rates
from benchmarks.speed.workload import (
    BATCH,
    BEHAVIOURS,
    HELD_OUT,
    ROWS,
    make_rows,
    write_arrays,
    write_dataset,
)
from launch.local import SLEEPING_THREADS
from launch.python_path import safe_environment
from trainer.console.text_table import text_table
from trainer.runtime.phase_timer import PHASES

SHORT = ("--rows", "24576", "--repeats", "1", "--setups", "1x1", "2x1")

FLOP_PER_ROW = 8.4e6
"""Forward and backward of the work as written down above, without shortcuts."""
GPU_BATCH, GPU_ROWS = 8192, 8 * ROWS
"""Rows of a step and of the training on GPUs, which a step of 2,048 would leave idle most of the time."""
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
    "tzrec": ThroughputSystem("easyrec.py", "shipped", "tzrec_python"),
    "tzrec-sharded": ThroughputSystem("easyrec.py", "sharded", "tzrec_python"),
}


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
    if not system.program:
        # As `limelight train` starts its ranks. Peers keep their default, which is theirs to choose.
        environment = {**SLEEPING_THREADS, **environment}
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
    parser.add_argument("--tzrec-python", metavar="PATH", default="", help="Python with TorchEasyRec (tzrec)")
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
