"""Measure what each part of Cross adds: Tables 2 and 4 of Moment&Cross on a simulated world.

    python -m benchmarks.quality.cross --work runs/cross --out benchmarks/results/cross.json

The world (``limelight data simulate --world cross``) has users with up to 12,000 visits and five interests, each of
which one of the five searches finds better than the others. For each seed the full model (PLE, five searches,
alignment) is trained with ``benchmarks/quality/cross.toml``, and again with one change: CGC in place of PLE, CGC
without any search, one search removed, no alignment, or attention as in DIN. It prints AUC and GAUC of the full model
on the days after training, the best possible (that of the true probabilities), and the differences of the other
variants to the full model of the same seed, in points, with 95 % intervals over the seeds (Student's t). Table 4 is the
difference without any short video in any search, by activity of the users.

The result of a variant and a seed is kept under ``--work`` and is not measured again, unless its job or the world has
changed. So the same command continues a benchmark that was stopped, by ``--minutes`` or otherwise. Two processes can
share the directory, each with seeds of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, slug, write_result
from benchmarks.quality.cross_report import (
    FULL,
    GROUPS,
    NO_VIDEOS,
    WITHOUT_CROSS,
    VariantResult,
    draw,
    summarise,
    tables,
)
from benchmarks.quality.kept_runs import KeptTables, kept_facts
from benchmarks.quality.ranker_runs import subset, train_and_predict
from trainer.config.ranker import JobConfig, load_config
from trainer.console.outputs import local_argument
from trainer.data.format.content_vectors import ITEM_VECTORS
from trainer.data.simulator.cross.write_dataset import simulate_cross
from trainer.ranking.evaluation import evaluate, read_truth
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json

JOB = "benchmarks/quality/cross.toml"
USERS, DAYS, PARTITIONS, WORLD_SEED = 400, 60, 8, 1
METRICS = ("auc", "gauc", "best_auc", "best_gauc", "positives", "rows")

WORLD_VECTORS = "the content vectors of the world"
"""Stands for the path of the table in the settings of a variant."""

VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "CGC": {"model.kind": "cgc"},
    WITHOUT_CROSS: {
        "model.kind": "cgc",
        **{f"features.history.{name}": None for name in ("short", "long", "author", "live_long", "mixed")},
        "alignment.anchor": "",
    },
    "no short": {"features.history.short": None},
    "no long": {"features.history.long": None},
    "no author": {"features.history.author": None},
    "no live_long": {"features.history.live_long": None},
    "no mixed": {"features.history.mixed": None, "alignment.anchor": ""},
    "no alignment": {"alignment.anchor": ""},
    "DIN attention": {"model.attention_kind": "din"},
    "content vectors": {"features.content": {"items": {"table": WORLD_VECTORS, "histories": True}}},
    NO_VIDEOS: {
        **{f"features.history.{name}": None for name in ("short", "long", "author")},
        "features.history.mixed.domain": "live",
    },
}
"""Variant -> changes to the job: dotted key -> value; None removes a key. Without ``mixed`` there is nothing to align
with, so the alignment goes too; the paper has no row for the alignment alone, and none for content vectors."""


def job_of(variant: str, world: Path, seed: int) -> JobConfig:
    """Return the job of a variant."""
    config = load_config(JOB, [f"data.path={world}", f"features.search.embedding={world / ITEM_VECTORS}"])
    content = config.model_dump(mode="json")
    for key, value in {**VARIANTS[variant], "run.seed": seed}.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        if value is None:
            del place[name]
        else:
            place[name] = json.loads(json.dumps(value).replace(WORLD_VECTORS, str(world / ITEM_VECTORS)))
    return JobConfig.model_validate(content)


def run(config: JobConfig, variant: str, world: World) -> VariantResult:
    """Train one variant, and evaluate it on the days after."""
    started = time.process_time()
    held_out, behaviours = train_and_predict(config, world)
    truth = read_truth(config.data.path, held_out, behaviours)
    if truth is None:
        sys.exit(f"{config.data.path}: has no true probabilities; give a dataset of `limelight data simulate`")
    band = activity(Path(config.data.path))[held_out.user_id.numpy()]
    groups = {"all": torch.ones(len(band), dtype=torch.bool)}
    groups |= {name: torch.from_numpy(band == 1 + number) for number, name in enumerate(GROUPS)}
    reports = {name: evaluate(subset(held_out, rows), behaviours, None, truth[rows]) for name, rows in groups.items()}
    figures = {
        name: {behaviour: {metric: found[metric] for metric in METRICS} for behaviour, found in report.items()}
        for name, report in reports.items()
    }
    return VariantResult(variant, config.run.seed, time.process_time() - started, figures)


def activity(world: Path) -> np.ndarray:
    """Return the activity band of each user id."""
    return pq.read_table(world / "users.parquet").sort_by("user_id")["activity_band"].to_numpy()


def result_file(work: Path, variant: str, seed: int) -> Path:
    """Return the file in which the result of a variant and a seed is kept."""
    return work / "results" / f"{slug(variant)}-{seed}.json"


def kept_result(work: Path, variant: str, seed: int, key: str) -> VariantResult | None:
    """Return the kept result of a variant and a seed; None if there is none, or one of another job or world."""
    facts = kept_facts(result_file(work, variant, seed), key)
    return None if facts is None else VariantResult(**facts)


def run_missing(options: argparse.Namespace, path: Path) -> None:
    """Run the variants that have no result yet, seed by seed, until ``options.minutes`` are over."""
    kept = KeptTables(options.work)
    stop = time.monotonic() + 60 * options.minutes
    with World.join("cpu") as world:
        for variant, seed in ((variant, seed) for seed in options.seeds for variant in options.variants):
            job = job_of(variant, path, seed)
            key = kept.key_of(job)
            if kept_result(options.work, variant, seed, key) is not None:
                continue
            if time.monotonic() > stop:
                break
            print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
            result = run(job, variant, world)
            file = result_file(options.work, variant, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, vars(result) | {"key": key})


def kept_results(work: Path, path: Path) -> list[VariantResult]:
    """Return all kept results of the jobs of this version, those of other seeds than asked for too."""
    kept, found = KeptTables(work), []
    for variant in VARIANTS:
        for file in sorted((work / "results").glob(f"{slug(variant)}-*.json")):
            seed = file.stem.removeprefix(f"{slug(variant)}-")
            # The name of one variant can begin with that of another.
            if not seed.isdecimal():
                continue
            result = kept_result(work, variant, int(seed), kept.key_of(job_of(variant, path, int(seed))))
            if result is None:
                print(f"{file}: of another job or world than those of this version; left out", file=sys.stderr)
            else:
                found.append(result)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.cross", __doc__)
    parser.add_argument(
        "--work",
        type=local_argument,
        default=Path("runs/cross"),
        help="keeps world and results (default: %(default)s)",
    )
    parser.add_argument("--users", type=int, default=USERS, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=DAYS, help="days of the world (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the models (default: 1 to 5)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time (default: no limit)")
    options = parser.parse_args(argv)
    begin_work("quality.cross", options, free=("variants", "seeds", "minutes"), contents={JOB: JOB})
    path = options.work / "world"
    if not path.exists():
        simulate_cross(path, options.users, options.days, PARTITIONS, WORLD_SEED)
    run_missing(options, path)
    runs = kept_results(options.work, path)
    if not any(run.variant == FULL for run in runs):
        sys.exit("limelight: error: no run of the full model is finished yet; the same command continues")
    result = summarise(runs, list(VARIANTS))
    print(tables(result))
    facts = {
        "question": "Tables 2 and 4 of Moment&Cross on a simulated world, in points",
        "world": {"users": options.users, "days": options.days, "seed": WORLD_SEED},
        "held_out": "from 28 April 2024 to the end; settings were chosen on 20 to 23 April",
        "runs": len(runs),
        "mean_cpu_seconds_of_a_run": float(np.mean([run.seconds for run in runs])),
    }
    write_result(options.out, {**facts, **result})
    if options.out:
        draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
