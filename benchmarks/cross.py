"""Does every part of Cross earn its place? Tables 2 and 4 of Moment&Cross on a simulated world.

    python -m benchmarks.cross --home runs/cross --out benchmarks/results/cross.json

The world (``limelight data simulate --world cross``) has users with up to 12,000 visits and five interests, each of
which one of the five searches finds better than the others. For each seed the full model (PLE, five searches,
alignment) is trained with ``benchmarks/cross.toml``, and again with one thing changed: CGC for PLE, one search removed,
or no alignment. Printed are AUC and GAUC of the full model on the days after training, the best possible AUC (that of
the true probabilities), and the differences of the other variants to the full model of the same seed, in points, with
95 % intervals over the seeds (Student's t). Table 4 is the difference by how active users are, without any short
video in any search.

A finished run is kept under ``--home`` and never done again: a benchmark that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.stats import t as student
from torch import Tensor

from trainer.config import JobConfig, load_config
from trainer.data.schema import DatasetSpec
from trainer.distributed import World
from trainer.evaluate import Predictions, evaluate, open_run, predict, read_truth, with_range
from trainer.job import held_out_loader, split_in_time
from trainer.preemption import Preemption
from trainer.rank import run_job
from trainer.run import environment, write_json

JOB = "benchmarks/cross.toml"
USERS, DAYS, WORLD_SEED = 400, 60, 1
EVAL_FROM, EVAL_UNTIL = "2024-04-23", "2024-04-30"
"""The day after training is left out: labels of its last visits were not complete."""

FULL, NO_VIDEOS = "full", "no short videos"
GROUPS = ("low", "middle", "high", "full")
"""Quarters of the users by activity, as the world's ``activity_band`` has them."""

Variant = dict[str, Any]
"""Changes to the job: dotted key -> value; None takes a key away."""

VARIANTS: dict[str, Variant] = {
    FULL: {},
    "CGC": {"model.kind": "cgc"},
    "no short": {"features.history.short": None},
    "no long": {"features.history.long": None},
    "no author": {"features.history.author": None},
    "no live_long": {"features.history.live_long": None},
    "no mixed": {"features.history.mixed": None, "alignment.anchor": ""},
    "no alignment": {"alignment.anchor": ""},
    NO_VIDEOS: {
        **{f"features.history.{name}": None for name in ("short", "long", "author")},
        "features.history.mixed.domain": "live",
    },
}


@dataclass(frozen=True)
class Measured:
    """A run's metrics: of all rows, and of each group of users. Group -> behaviour -> metric -> value."""

    variant: str
    seed: int
    seconds: float
    groups: dict[str, dict[str, dict[str, float]]]

    def value(self, group: str, behaviour: str, metric: str) -> float:
        """One figure in points: percent."""
        return 100 * self.groups[group][behaviour][metric]


def job_of(variant: Variant, world: Path, directory: Path, seed: int) -> JobConfig:
    """The job of a variant."""
    config = load_config(JOB, [f"data.path={world}", f"features.search.embedding={world / 'embeddings' / 'items'}"])
    content = config.model_dump(mode="json")
    for key, value in {**variant, "run.directory": str(directory), "run.seed": seed}.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        if value is None:
            del place[name]
        else:
            place[name] = value
    return JobConfig.model_validate(content)


def run(variant: str, seed: int, world_path: Path, home: Path, world: World, preemption: Preemption) -> Measured:
    """Train one variant with one seed, and judge it on the days after."""
    directory = home / "running"
    shutil.rmtree(directory, ignore_errors=True)
    started = time.process_time()
    config = job_of(VARIANTS[variant], world_path, directory, seed)
    run_job(config, world, preemption)
    trained = open_run(str(directory), world)
    config = with_range(config, None, EVAL_FROM, EVAL_UNTIL)
    split = split_in_time(config, trained.data.spec)
    loader = held_out_loader(config, trained.data, split, trained.features, world, None, trained.space)
    held_out = predict(trained.engine, loader, quiet=True)
    behaviours = trained.features.behaviours
    truth = read_truth(config.data.path, held_out, behaviours)
    assert truth is not None, "a simulated world has its truth"
    band = activity(world_path)[held_out.user_id.numpy()]
    groups = {"all": torch.ones(len(band), dtype=torch.bool)}
    groups |= {name: torch.from_numpy(band == 1 + number) for number, name in enumerate(GROUPS)}
    reports = {name: evaluate(subset(held_out, rows), behaviours, truth[rows]) for name, rows in groups.items()}
    shutil.rmtree(directory)
    kept = ("auc", "gauc", "best_auc", "best_gauc", "positives", "rows")
    figures = {
        name: {behaviour: {metric: found[metric] for metric in kept} for behaviour, found in report.items()}
        for name, report in reports.items()
    }
    return Measured(variant, seed, time.process_time() - started, figures)


def subset(predictions: Predictions, rows: Tensor) -> Predictions:
    """Some rows, ``[n] bool``."""
    return replace(predictions, **{field.name: getattr(predictions, field.name)[rows] for field in fields(predictions)})


def activity(world: Path) -> np.ndarray:
    """Activity band of each user id."""
    return pq.read_table(world / "users.parquet").sort_by("user_id")["activity_band"].to_numpy()


def measure(options: argparse.Namespace, world_path: Path) -> list[Measured]:
    """All runs that are kept, after doing those that are missing and that there is time for."""
    found: dict[tuple[str, int], Measured] = {}
    missing = []
    for variant, seed in planned(options):
        file = result_file(options.home, variant, seed)
        if file.exists():
            found[variant, seed] = Measured(**json.loads(file.read_text()))
        else:
            missing.append((variant, seed))
    stop = time.monotonic() + 60 * options.minutes
    if missing:
        with World.join("cpu") as world:
            preemption = Preemption()
            for variant, seed in missing:
                if time.monotonic() > stop:
                    break
                result = found[variant, seed] = run(variant, seed, world_path, options.home, world, preemption)
                file = result_file(options.home, variant, seed)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, vars(result))
    return list(found.values())


def planned(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Runs in order, seed by seed, so that a benchmark that is stopped has whole seeds."""
    return ((variant, seed) for seed in range(1, options.seeds + 1) for variant in VARIANTS)


def result_file(home: Path, variant: str, seed: int) -> Path:
    """Where a run's figures are kept."""
    return home / "results" / f"{variant.replace(' ', '-')}-{seed}.json"


def summarise(runs: list[Measured]) -> dict[str, Any]:
    """Table 2 by behaviour, and Table 4 by behaviour and group; figures in points with half-widths of 95 % intervals."""
    by_seed: dict[int, dict[str, Measured]] = {}
    for measured in runs:
        by_seed.setdefault(measured.seed, {})[measured.variant] = measured
    seeds = [found for found in by_seed.values() if FULL in found]
    behaviours = list(seeds[0][FULL].groups["all"])

    def difference(variant: str, group: str, behaviour: str, metric: str) -> dict[str, float | None]:
        pairs = [(found[variant], found[FULL]) for found in seeds if variant in found]
        return with_interval([one.value(group, behaviour, metric) - full.value(group, behaviour, metric) for one, full in pairs])

    table_2: dict[str, Any] = {}
    for behaviour in behaviours:
        full = [found[FULL] for found in seeds]
        one = full[0].groups["all"][behaviour]
        table_2[behaviour] = {
            "positives": one["positives"],
            "rows": one["rows"],
            "best_auc": 100 * one["best_auc"],
            "best_gauc": 100 * one["best_gauc"],
            "full": {m: with_interval([run.value("all", behaviour, m) for run in full]) for m in ("auc", "gauc")},
            "difference": {
                variant: {metric: difference(variant, "all", behaviour, metric) for metric in ("auc", "gauc")}
                for variant in VARIANTS
                if variant != FULL and any(variant in found for found in seeds)
            },
        }
    table_4 = {
        behaviour: {group: difference(NO_VIDEOS, group, behaviour, "auc") for group in GROUPS} for behaviour in behaviours
    }
    return {"table_2": table_2, "table_4": table_4, "seeds": sorted(by_seed)}


def with_interval(values: list[float]) -> dict[str, float | None]:
    """Mean, and the half-width of its 95 % interval over seeds; None for a single seed."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    return {"mean": float(np.mean(values)) if n else None, "half_width_95": half, "seeds": n}
