"""Measure what compiled loops save in the experts and towers of a PLE ranker.

    python -m benchmarks.speed.experts --out benchmarks/results/experts.json

The network is that of the throughput benchmark without its tables and histories. Each group of its layers, and then the
whole network, are computed by the compiled loops of ``modules/expert_kernel.py`` and by PyTorch's operations, forward
and backward, by turns on the same data; the median and the range of all rounds are stored. Gradients are those of the
inputs and of all parameters.

One thread, float32. Times are processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import make_parser, write_result
from benchmarks.speed.attention import TOLERANCE, Way, difference, times_by_turns
from benchmarks.speed.workload import (
    BEHAVIOURS,
    DENSE,
    DIM,
    EXPERT_LAYERS,
    SHARED_EXPERTS,
    SIDE,
    TASK_EXPERTS,
    TOWER,
)
from modules.multitask import PLE, BatchedMLP, Towers
from modules.vector_code import instructions_for
from trainer.console.text_table import text_table

SHORT = ("--rows", "64", "--rounds", "2")

INPUTS = (3 + len(SIDE) + 2) * DIM + DENSE
"""Inputs of the network: user, author, item, further ids, two histories, and dense values."""


def compare(name: str, network: nn.Module, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Return the times of a network by loops and by PyTorch's operations.

    Raises:
        SystemExit: the results or the gradients do not agree.
    """
    layers = [module for module in network.modules() if isinstance(module, BatchedMLP)]
    gradients_of = [x, *network.parameters()]

    def by(compiled: bool) -> Way:
        def way() -> Tensor:
            for each in layers:
                each.compiled = compiled
            out: Tensor = network(x)
            return out

        return way

    ways = {"loops": by(compiled=True), "operations": by(compiled=False)}
    apart = difference(ways["loops"], ways["operations"], gradients_of)
    if apart > TOLERANCE:
        raise SystemExit(f"{name}: loops and operations differ by {apart:.1e} of the largest value")
    return [
        {
            "part": name,
            "way": way,
            **seconds,
            "difference": apart,
        }
        for way, seconds in times_by_turns(ways, gradients_of, rounds).items()
    ]


def report(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table."""
    lines = [
        [
            row["part"],
            row["way"],
            *(f"{1000 * row[f'{part}_seconds']['median']:.1f}" for part in ("forward", "backward")),
        ]
        for row in rows
    ]
    return text_table(["part", "way", "forward ms", "backward ms"], lines, texts=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("speed.experts", __doc__)
    parser.add_argument("--rows", type=int, default=2048, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each way (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    behaviours, experts = len(BEHAVIOURS), len(BEHAVIOURS) * TASK_EXPERTS + SHARED_EXPERTS
    widths = (INPUTS, *(layer[-1] for layer in EXPERT_LAYERS))
    parts: dict[str, tuple[nn.Module, int, int]] = {
        # Experts of further layers read an input each here; in the network, those of a behaviour share one.
        f"experts {number}": (BatchedMLP(experts, before, layer), experts if number > 1 else 1, before)
        for number, (before, layer) in enumerate(zip(widths, EXPERT_LAYERS, strict=False), 1)
    }
    parts["towers"] = (BatchedMLP(behaviours, widths[-1], TOWER), behaviours, widths[-1])
    body = PLE(INPUTS, behaviours, TASK_EXPERTS, SHARED_EXPERTS, EXPERT_LAYERS)
    whole = nn.Sequential(body, Towers(body.out_features, behaviours, TOWER))
    rows = []
    if instructions_for(torch.device("cpu")):
        for name, (network, inputs, width) in parts.items():
            x = torch.randn(inputs, options.rows, width, requires_grad=True)
            rows += compare(name, network, x, options.rounds)
        rows += compare("whole", whole, torch.randn(options.rows, INPUTS, requires_grad=True), options.rounds)
    print(report(rows))
    settings = {
        "rows": options.rows,
        "inputs": INPUTS,
        "experts": experts,
        "expert_layers": EXPERT_LAYERS,
        "tower": TOWER,
        "instructions": instructions_for(torch.device("cpu")),
    }
    write_result(options.out, {"experts": rows, "settings": settings, "load_average": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
