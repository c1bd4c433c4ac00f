"""Measure each part of a training step against the rates of the machine: how near is it to what the machine allows?

    python -m benchmarks.speed.roofline --out benchmarks/results/roofline.json

The workload of ``benchmarks/speed/throughput.py`` on one rank. Every part has the floating-point operations and the
bytes that its task needs at least, counted from the shapes as written down, without shortcuts (``work``). Its floor is
the longer of two times: operations at the rate of a matrix product, and bytes at the rate of a copy, both measured in
this run, before and after the steps. A part's share is its floor divided by its time. The matrix rate is that of the
precision of the dense network.

``tables`` are lookup and update, ``experts`` PLE and towers, ``optimizer`` the step of the dense network's optimizer,
``rest`` what remains of the dense network: loss, joining of inputs, DeepSpeed's bookkeeping.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.measure import make_parser, median_and_range, write_result
from benchmarks.speed.limelight_training import (
    WARM_UP_STEPS,
    WorkloadFeatures,
    make_engine,
    make_loader,
    make_ranker,
)
from benchmarks.speed.machine_rates import machine_rates
from benchmarks.speed.workload import (
    ATTENTION,
    BATCH,
    BEHAVIOURS,
    DENSE,
    DIM,
    EXPERT_LAYERS,
    LENGTH,
    SHARED_EXPERTS,
    SIDE,
    TASK_EXPERTS,
    TOWER,
    make_rows,
    write_dataset,
)
from trainer.console.text_table import text_table
from trainer.data.format.schema import DatasetSpec
from trainer.engine.dense_engine import DenseNetwork
from trainer.runtime.distributed import World

SHORT = ("--steps", "6", "--threads", "1")

PRECISIONS = ("fp32", "bf16")
"""Precisions of the dense network; a CPU computes TF32 in float32."""

PARTS = ("data", "tables", "DIN", "experts", "optimizer", "rest")
HISTORIES = 2
FLOAT = 4


def work(rows: int, parameters: int) -> dict[str, tuple[float, float]]:
    """Return the floating-point operations and the bytes of each part of a step, as (operations, bytes).

    A backward pass has twice the operations of the forward pass. Bytes are those of tables, batches and optimizer
    states; activations are not counted, since a kernel may keep them in cache.

    Args:
        rows: rows of the step.
        parameters: parameters of the dense network.
    """
    ids = rows * (3 + len(SIDE) + HISTORIES * LENGTH)
    first, second = ATTENTION
    entry = 2 * (4 * DIM * first + first * second + second) + 2 * DIM
    layers = 0
    width = DIM * (3 + len(SIDE) + HISTORIES) + DENSE
    experts = len(BEHAVIOURS) * TASK_EXPERTS + SHARED_EXPERTS
    for widths in EXPERT_LAYERS:
        layers += experts * sum(2 * a * b for a, b in pairwise([width, *widths]))
        width = widths[-1]
    towers = len(BEHAVIOURS) * sum(2 * a * b for a, b in pairwise([width, *TOWER, 1]))
    return {
        # An id is read from disk's cache and written into the batch.
        "data": (0.0, 2.0 * 8 * ids),
        # The lookup reads and writes a row; Adagrad reads the gradient, and reads and writes the row and its state.
        "tables": (0.0, 7.0 * FLOAT * DIM * ids),
        "DIN": (3.0 * rows * HISTORIES * LENGTH * entry, 2.0 * FLOAT * DIM * rows * HISTORIES * LENGTH),
        "experts": (3.0 * rows * (layers + towers), 0.0),
        # Adam reads parameter, gradient and two moments, and writes all but the gradient.
        "optimizer": (0.0, 7.0 * FLOAT * parameters),
        "rest": (0.0, 0.0),
    }


class ModuleClock:
    """Seconds of the forward and backward passes of modules, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, name: str, module: nn.Module) -> None:
        """Count the time of a module's passes under ``name``."""
        begun: list[float] = []

        def begin(*_: Any) -> None:
            begun.append(time.perf_counter())

        def end(*_: Any) -> None:
            self.seconds[name] += time.perf_counter() - begun.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
        module.register_full_backward_pre_hook(begin)
        module.register_full_backward_hook(end)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts its time under ``name``."""

        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] += time.perf_counter() - begin
            return result

        return run


def measure(path: Path, precision: str, threads: int, batch_size: int) -> dict[str, Any]:
    """Return the parts of a step of one precision, with the machine's rates before and after."""
    before = machine_rates(threads)
    torch.set_num_threads(threads)
    steps: list[dict[str, float]] = []
    with World.join("cpu") as world:
        features = WorkloadFeatures(DatasetSpec.load(path))
        ranker = make_ranker(features)
        clock = ModuleClock()
        assert isinstance(ranker.attention, nn.ModuleList)
        for attention in ranker.attention:
            clock.watch("DIN", attention)
        clock.watch("experts", ranker.network)
        with patch.object(DenseNetwork, "step", clock.timed("optimizer", DenseNetwork.step)):
            engine = make_engine(features, ranker, precision, batch_size, world.device)
            for number, result in enumerate(engine.steps(iter(make_loader(path, features, world, batch_size)))):
                found = dict(clock.seconds)
                clock.seconds.clear()
                if number >= WARM_UP_STEPS and result.rows_global == batch_size:
                    phases = result.seconds
                    rest = phases["dense"] - sum(found.values())
                    steps.append({"data": phases["data"], "tables": phases["tables"], **found, "rest": rest})
        parameters = sum(parameter.numel() for parameter in ranker.parameters())
        engine.close()
    after = machine_rates(threads)
    rates = {name: statistics.median([before[name], after[name]]) for name in before}
    product = rates["product_gflops" if precision == "fp32" else "bf16_product_gflops"] * 1e9
    parts = []
    for part, (operations, size) in work(batch_size, parameters).items():
        seconds = median_and_range([step[part] for step in steps])
        floor = max(operations / product, size / (rates["copy_gb_per_second"] * 1e9))
        parts.append(
            {
                "part": part,
                "seconds": seconds,
                "operations": operations,
                "bytes": size,
                "floor_seconds": floor,
                "share_of_floor": floor / seconds["median"] if floor else None,
            }
        )
    return {"precision": precision, "threads": threads, "steps": len(steps), "rates": rates, "parts": parts}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the parts as a text table."""
    lines = []
    for result in results:
        for part in result["parts"]:
            seconds, share = part["seconds"], part["share_of_floor"]
            lines.append(
                [
                    f"{result['precision']}, {result['threads']} threads",
                    part["part"],
                    f"{seconds['median'] * 1e3:.1f}",
                    f"{seconds['least'] * 1e3:.1f} to {seconds['most'] * 1e3:.1f}",
                    f"{part['operations'] / 1e9:.1f}",
                    f"{part['bytes'] / 1e6:.0f}",
                    f"{part['floor_seconds'] * 1e3:.1f}",
                    "-" if share is None else f"{share:.0%}",
                ]
            )
    return text_table(["dense network", "part", "ms", "spread", "GFLOP", "MB", "floor, ms", "of floor"], lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.roofline", __doc__)
    parser.add_argument("--steps", type=int, default=40, help="measured steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of the rank (default: 1 2)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide ids and batch by this, to try it (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    batch = BATCH // options.scale
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "train"
        write_dataset(path, make_rows(batch * (WARM_UP_STEPS + options.steps), options.scale, seed=1), options.scale)
        results = [measure(path, precision, threads, batch) for threads in options.threads for precision in PRECISIONS]
    print(table(results))
    for result in results:
        rates = ", ".join(f"{name} {value:.0f}" for name, value in result["rates"].items())
        print(f"{result['precision']}, {result['threads']} threads: {rates}")
    write_result(options.out, {"batch": batch, "results": results})


if __name__ == "__main__":
    main()
