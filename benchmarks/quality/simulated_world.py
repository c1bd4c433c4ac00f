"""Compare the networks with the best possible AUC of a simulated world.

    python -m benchmarks.quality.simulated_world --out benchmarks/results/simulated_world.json

Trains logistic regression, shared-bottom, DCN, MMoE, CGC and PLE with ``configs/simulated.toml`` on a world whose true
probabilities are known, several seeds each, and prints AUC per behaviour on the held-out days: mean and 95 % interval
over the seeds (Student's t), the best possible AUC (that of the true probabilities), and the share of the gap between
logistic regression and the best possible that each network closes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import make_parser, mean_and_half_width, run_limelight, write_result

JOB = "configs/simulated.toml"
MODELS = ("ple", "cgc", "mmoe", "dcn", "shared_bottom", "logistic")


def run_seed(world: Path, directory: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train all models with one seed; return the metrics by model and behaviour."""
    settings = [f"data.path={world}", f"run.directory={directory}", f"run.seed={seed}", *options.overrides]
    settings.append(f"train.baselines={json.dumps(MODELS[1:])}")
    run_limelight("train", JOB, *settings, f"--ranks={options.ranks}")
    files = {
        name: (directory if name == MODELS[0] else directory / "baselines" / name) / "metrics.json" for name in MODELS
    }
    return {name: json.loads(file.read_text())["behaviours"] for name, file in files.items()}


def summarise(seeds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return by behaviour the best AUC, and by model mean AUC with its interval, mean GAUC and share of the gap."""
    result: dict[str, Any] = {}
    for behaviour, first in seeds[0][MODELS[0]].items():
        best = first["best_auc"]
        aucs = {name: np.array([seed[name][behaviour]["auc"] for seed in seeds]) for name in MODELS}
        floor = aucs["logistic"].mean()
        result[behaviour] = {
            "best_auc": best,
            "positives": first["positives"],
            "models": {
                name: {
                    "auc": float(auc.mean()),
                    "half_width_95": mean_and_half_width(auc.tolist())[1],
                    "gauc": float(np.mean([seed[name][behaviour]["gauc"] for seed in seeds])),
                    "gap_closed": float((auc.mean() - floor) / (best - floor)),
                }
                for name, auc in aucs.items()
            },
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of AUC, with the share of the gap closed in brackets."""
    lines = ["| behaviour | positives | " + " | ".join(reversed(MODELS)) + " | best possible |"]
    lines.append("|---" * (len(MODELS) + 3) + "|")
    for behaviour, found in result.items():
        cells = []
        for name in reversed(MODELS):
            model = found["models"][name]
            spread = "" if model["half_width_95"] is None else f" ±{model['half_width_95']:.4f}"
            cells.append(f"{model['auc']:.4f}{spread} ({model['gap_closed']:.0%})")
        lines.append(f"| {behaviour} | {found['positives']:,} | " + " | ".join(cells) + f" | {found['best_auc']:.4f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.simulated_world", __doc__)
    parser.add_argument("--world", type=Path, help="simulated dataset (default: simulate one)")
    parser.add_argument("--users", type=int, default=3000, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=10, help="days of the world (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a training (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        world = options.world or Path(temporary) / "world"
        if not options.world:
            size = ["--users", options.users, "--days", options.days, "--partitions", 8, "--seed", 1]
            run_limelight("data", "simulate", world, *size)
        seeds = [
            run_seed(world, Path(temporary) / f"run-{seed}", seed, options) for seed in range(1, options.seeds + 1)
        ]
    result = summarise(seeds)
    print(table(result))
    facts = {"question": "AUC against the best possible on a simulated world", "seeds": options.seeds}
    write_result(options.out, {**facts, "result": result}, options.ranks)


if __name__ == "__main__":
    main()
