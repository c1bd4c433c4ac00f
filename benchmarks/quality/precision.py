"""Measure what bfloat16 and the compiled loops cost in quality: AUC beside float32, and beside PyTorch's operations.

    python -m benchmarks.quality.precision --kuairand data/kuairand --out benchmarks/results/precision.json

The rankers of ``configs/simulated.toml`` and ``configs/kuairand.toml`` differ in nothing but how their dense networks
are computed on a CPU: in float32 by compiled loops, which is what a job does by default; in float32 by PyTorch's
operations; and in bfloat16, where the attention of ``din`` is computed by compiled loops too. Each is trained with the
same seeds. So a difference beyond what seeds differ by is one of the arithmetic.

Nothing is chosen here, and the days are the tuning days all the same: the two before the last two of the simulated
world, and 2 and 3 May 2022 of KuaiRand. Differences are in points, with two 95 % intervals: over users (paired
bootstrap, the mean over the seeds inside each draw), and over the seeds (Student's t of the differences of equal
seeds). ``seed_deviation`` is the standard deviation of the default's metric over its seeds, in points.

The world and all trainings are kept under ``--work`` and are not repeated, so the same command continues a benchmark
that was stopped; the report has all trainings that are kept. Without ``--kuairand`` it has the simulated world only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from benchmarks.measure import make_parser, mean_and_half_width, slug, write_result
from benchmarks.quality.kept_runs import Recipe, read_runs, run_file, settings_of, train_once
from benchmarks.quality.larm_report import cell
from benchmarks.quality.paired_users import DRAWS
from benchmarks.quality.recipe import COMMON, DAYS, TUNING
from benchmarks.quality.recipe_report import METRICS, summarise
from modules.vector_code import INSTRUCTIONS
from trainer.config.ranker import JobConfig, load_config
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.distributed import World

USERS, WORLD_DAYS, PARTITIONS, WORLD_SEED = 3000, 10, 8, 1
"""The world of ``make train``."""


@dataclass(frozen=True)
class MeasuredLog:
    """A log that the rankers are trained on.

    Attributes:
        job: file of the job.
        days: settings of its tuning days.
    """

    job: str
    days: tuple[str, ...]


SIMULATED, KUAIRAND = "simulated", "kuairand"
LOGS = {
    SIMULATED: MeasuredLog("configs/simulated.toml", DAYS[TUNING]),
    KUAIRAND: MeasuredLog("configs/kuairand.toml", ("data.eval_from=2022-05-02", "data.eval_until=2022-05-04")),
}

DEFAULT, OPERATIONS, HALF = "fp32", "fp32, PyTorch's operations", "bf16"
_LOOPS = ("model.compiled_attention=true", "model.compiled_experts=true")
VARIANTS: dict[str, Recipe] = {
    DEFAULT: Recipe("", ('train.precision="fp32"', *_LOOPS)),
    HALF: Recipe(DEFAULT, ('train.precision="bf16"',)),
    OPERATIONS: Recipe(DEFAULT, ("model.compiled_attention=false", "model.compiled_experts=false")),
}
"""Ways to compute the dense network; all are compared with the first."""


def job_of(name: str, log: str, seed: int, data: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Return the job of a training."""
    own = (f"data.path={data}", f"run.seed={seed}", *COMMON, *LOGS[log].days, *overrides)
    return load_config(LOGS[log].job, [*settings_of(VARIANTS, name), *own])


def train_missing(options: argparse.Namespace, paths: Mapping[str, Path], world: World) -> None:
    """Train what is missing in ``options.work``: all ways with one seed, then with the next one."""
    for seed, log, name in ((seed, log, name) for seed in options.seeds for log in paths for name in VARIANTS):
        job = job_of(name, log, seed, paths[log], options.overrides)
        train_once(run_file(options.work / slug(log), seed, name), job, world, f"{log}, {name}, seed {seed}")


def over_seeds(result: dict[str, Any]) -> None:
    """Add to the figures of each behaviour how much the default differs by seed, and intervals over the seeds."""
    n = len(result["recipes"][DEFAULT]["seeds"])
    for found in result["behaviours"].values():
        for metric in METRICS:
            half = found["recipes"][DEFAULT][metric][1]
            deviation = None if half is None else 100 * half * math.sqrt(n) / float(student.ppf(0.975, n - 1))
            found.setdefault("seed_deviation", {})[metric] = deviation
            for line in found["recipes"].values():
                line[f"{metric}_over_seeds"] = mean_and_half_width(line[f"{metric}_difference"]["seeds"])


def tables(result: Mapping[str, Any]) -> str:
    """Return all differences as text: a table for each log and metric."""
    blocks = []
    for log, of_log in result["logs"].items():
        others = [name for name in of_log["recipes"] if name != DEFAULT]
        for metric in METRICS:
            lines = []
            for behaviour, found in of_log["behaviours"].items():
                deviation, value = found["seed_deviation"][metric], found["recipes"][DEFAULT][metric][0]
                line = [behaviour, "-" if value is None else f"{value:.4f}"]
                line.append("-" if deviation is None else f"{deviation:.2f}")
                for name in others:
                    mean, half = found["recipes"][name][f"{metric}_over_seeds"]
                    line.append(cell(found["recipes"][name][f"{metric}_difference"]))
                    line.append("-" if mean is None or half is None else f"±{half:.2f}")
                lines.append(line)
            header = [f"{log}, {metric.upper()}", DEFAULT, "by seed"]
            blocks.append(text_table([*header, *(text for name in others for text in (name, "over seeds"))], lines))
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.precision", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/precision"), help="keeps all (default: %(default)s)"
    )
    parser.add_argument("--kuairand", type=Path, metavar="PATH", help="imported dataset of KuaiRand-Pure")
    parser.add_argument("--users", type=int, default=USERS, help="of the simulated world (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the rankers (default: 1 to 5)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    paths = {SIMULATED: options.work / f"world-{options.users}"}
    if not paths[SIMULATED].exists():
        options.work.mkdir(parents=True, exist_ok=True)
        simulate(paths[SIMULATED], options.users, WORLD_DAYS, PARTITIONS, WORLD_SEED)
    if options.kuairand:
        paths[KUAIRAND] = options.kuairand
    with World.join("cpu") as world:
        train_missing(options, paths, world)
    result: dict[str, Any] = {"logs": {}}
    for log, path in paths.items():

        def job(name: str, seed: int, log: str = log, path: Path = path) -> JobConfig:
            return job_of(name, log, seed, path, options.overrides)

        runs = read_runs(options.work / slug(log), VARIANTS, job)
        of_log = summarise(runs, {name: found.than for name, found in VARIANTS.items()}, DEFAULT, None, {})
        over_seeds(of_log)
        result["logs"][log] = {"job": LOGS[log].job, "days": LOGS[log].days, **of_log}
    print(tables(result))
    facts = {
        "question": "AUC in bfloat16 and by PyTorch's operations, beside float32 by compiled loops",
        "world": {"users": options.users, "days": WORLD_DAYS, "seed": WORLD_SEED},
        "instructions": INSTRUCTIONS,
        "settings": {name: settings_of(VARIANTS, name) for name in VARIANTS},
        "draws": DRAWS,
        "overrides": options.overrides,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
