"""How close do the networks come to the best possible AUC of a simulated world?

    python -m benchmarks.quality.simulated_world --out benchmarks/results/simulated_world.json

Trains logistic regression, shared-bottom, MMoE, CGC and PLE with ``configs/simulated.toml`` on a world whose true
probabilities are known, several seeds each, and prints AUC per behaviour on the held-out days: mean and 95 % interval
over the seeds (Student's t), the best possible AUC (that of the true probabilities), and the share of the gap between
logistic regression and the best possible that each network closes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from trainer.runtime.environment import environment
from trainer.runtime.files import write_json

JOB = "configs/simulated.toml"
MODELS = ("ple", "cgc", "mmoe", "shared_bottom", "logistic")


def run_seed(world: Path, directory: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train all models with one seed; model -> metrics by behaviour."""
    settings = [f"data.path={world}", f"run.directory={directory}", f"run.seed={seed}", *options.overrides]
    settings.append(f"train.baselines={json.dumps(MODELS[1:])}")
    command = [sys.executable, "-m", "launch.cli.main", "train", JOB, *settings, f"--ranks={options.ranks}"]
    subprocess.run(command, check=True)
    homes = {name: directory if name == MODELS[0] else directory / "baselines" / name for name in MODELS}
    return {name: json.loads((home / "metrics.json").read_text())["behaviours"] for name, home in homes.items()}


def summarise(seeds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Behaviour -> best AUC and, per model, mean AUC and GAUC, half-width of the 95 % interval, share of the gap."""
    result: dict[str, Any] = {}
    width = float(student.ppf(0.975, len(seeds) - 1) / np.sqrt(len(seeds))) if len(seeds) > 1 else float("nan")
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
                    "half_width_95": float(auc.std(ddof=1) * width) if len(seeds) > 1 else None,
                    "gauc": float(np.mean([seed[name][behaviour]["gauc"] for seed in seeds])),
                    "gap_closed": float((auc.mean() - floor) / (best - floor)),
                }
                for name, auc in aucs.items()
            },
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: AUC, and the share of the gap closed in brackets."""
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, help="a simulated dataset; default: 3,000 users, 10 days, seed 1")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a training (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        world = options.world or Path(temporary) / "world"
        if not options.world:
            size = ["--users", "3000", "--days", "10", "--partitions", "8", "--seed", "1"]
            subprocess.run([sys.executable, "-m", "launch.cli.main", "data", "simulate", str(world), *size], check=True)
        seeds = [
            run_seed(world, Path(temporary) / f"run-{seed}", seed, options) for seed in range(1, options.seeds + 1)
        ]
    result = summarise(seeds)
    print(table(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"question": "AUC against the best possible on a simulated world", "seeds": options.seeds}
        write_json(options.out, {**facts, "environment": environment(options.ranks), "result": result})


if __name__ == "__main__":
    main()
