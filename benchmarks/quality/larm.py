"""Measure what LARM's parts add: vectors, alignment, codes; for frequent, rare and new authors.

    python -m benchmarks.quality.larm --work runs/larm --out benchmarks/results/larm.json

The world is simulated with segment vectors. Half of the variance of the authors' styles follows what viewers like
(``--taste``), and half of the live authors open their first room on a random day (``--newcomers``), so that some
authors of the held-out days are new. For each seed the two towers are trained four times (both parts with the gate,
without the correction for popularity, ids and features alone, content alone), the aligned vectors are written, and
codebooks of raw and of aligned vectors are fitted. The segments of the held-out days take no part in a fit. Then the
ranker of ``larm.toml`` is trained with each set of features.

Tables: Recall@K over all authors on air, and AUC and GAUC of the ranker, with the differences to ids only in points,
for all rows and by the popularity of the author. Intervals are over users (paired bootstrap), means over the seeds.

Every finished part is kept under ``--work``, so the same command continues a benchmark that was stopped.

A world of this size has about twelve authors on air at once, too few for Recall@50 and Recall@100. A larger one, with
the towers alone:

    python -m benchmarks.quality.larm --work runs/larm-on-air --out benchmarks/results/larm_on_air.json \
        --retrieval-only --users 26000 --days 4 --held-out-days 1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, run_limelight, slug, write_result
from benchmarks.quality.kept_runs import KeptTables, train_once
from benchmarks.quality.larm_report import (
    IDS,
    RANKERS,
    TOWERS,
    Scores,
    author_groups,
    draw,
    ranking_result,
    retrieval_result,
    tables,
)
from benchmarks.quality.paired_users import DRAWS
from trainer.config.ranker import JobConfig, load_config
from trainer.console.outputs import local_argument
from trainer.data.format.content_vectors import SEGMENT_VECTORS
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.distributed import World

JOB, ALIGN_JOB, QUANTIZE_JOB = (
    "benchmarks/quality/larm.toml",
    "configs/align.toml",
    "configs/quantize.toml",
)
USERS, DAYS, PARTITIONS, WORLD_SEED = 3000, 10, 4, 1
HELD_OUT_DAYS = 2
ITERATIONS = 10
"""Passes of k-means; the distortion changes by less than 1 % after them."""


class LarmWork:
    """Files of the benchmark, made when they are first needed.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.world = options.work / "world"
        self._tables = KeptTables(options.work)
        self._eval_from = f"2024-03-{4 + options.days - options.held_out_days:02d}"

    def simulate(self) -> None:
        """Simulate the world, if it is not there."""
        if not self.world.exists():
            options = self._options
            self.world.parent.mkdir(parents=True, exist_ok=True)
            simulate(
                self.world,
                options.users,
                options.days,
                PARTITIONS,
                WORLD_SEED,
                segment_noise=DEFAULT_NOISE,
                segment_taste=options.taste,
                newcomers=options.newcomers,
            )

    def towers(self, variant: str, seed: int) -> Path:
        """Return the finished run of the two towers of a variant."""
        run = self._options.work / f"seed-{seed}" / f"towers-{slug(variant)}"
        if not (run / "metrics.json").exists():
            settings = [f"data.path={self.world}", f"data.eval_from={self._eval_from}", f"run.seed={seed}"]
            settings += [f"run.directory={run}", *self._options.towers, *TOWERS[variant]]
            run_limelight("align", ALIGN_JOB, *settings)
        return run

    def vectors(self, name: str, seed: int) -> Path:
        """Return a table of segment vectors: the ``raw`` ones, or those of a variant of the towers."""
        if name == "raw":
            return self.world / SEGMENT_VECTORS
        return self.towers(name, seed) / "authors"

    def codes(self, name: str, seed: int) -> Path:
        """Return the code file of a table of vectors."""
        folder = self._options.work / f"seed-{seed}"
        file, codebook = folder / f"codes-{slug(name)}.parquet", folder / f"codebook-{slug(name)}"
        if not file.exists():
            table = self.vectors(name, seed)
            settings = [f"data.path={self.world}", f"data.vectors={table}", f"data.fit_until={self._eval_from}"]
            settings += [f"codebook.directory={codebook}", f"codebook.seed={seed}", f"codebook.iterations={ITERATIONS}"]
            run_limelight("quantize", QUANTIZE_JOB, *settings, f"codebook.levels={json.dumps(self._options.levels)}")
            run_limelight("quantize", "assign", codebook, self.world, file, "--vectors", table)
        return file

    def job(self, variant: str, seed: int) -> JobConfig:
        """Return the job of a ranker."""
        overrides = [f"data.path={self.world}", f"data.eval_from={self._eval_from}", f"run.seed={seed}"]
        for setting in RANKERS[variant]:
            key, _, value = setting.partition("=")
            kind, _, name = value.partition(":")
            if kind == "vectors":
                value = str(self.vectors(name, seed))
            elif kind == "codes":
                value = str(self.codes(name, seed))
            overrides.append(f"{key}={value}")
        return load_config(JOB, [*overrides, *self._options.overrides])

    def scores(self, variant: str, seed: int, world: World) -> Scores:
        """Return the predictions of a ranker."""
        file, job = self._options.work / f"seed-{seed}" / f"ranker-{slug(variant)}.json", self.job(variant, seed)
        train_once(file, job, world, f"ranker, {variant}, seed {seed}", self._tables.key_of(job))
        return Scores.read(file.with_suffix(".npz"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.larm", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/larm"), help="keeps all parts (default: %(default)s)"
    )
    parser.add_argument("--users", type=int, default=USERS, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=DAYS, help="days of the world (default: %(default)s)")
    parser.add_argument(
        "--held-out-days", type=int, default=HELD_OUT_DAYS, help="last days of the world (default: %(default)s)"
    )
    parser.add_argument("--taste", type=float, default=0.5, help="share of the styles that follows what viewers like")
    parser.add_argument("--newcomers", type=float, default=0.5, help="share of the live authors who come later")
    parser.add_argument("--levels", type=int, nargs="+", default=[256, 256, 256], help="codes of each level")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the models (default: 1 to 5)")
    parser.add_argument("--towers", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all two towers")
    parser.add_argument("--rankers", nargs="+", choices=RANKERS, default=list(RANKERS), help="default: all")
    parser.add_argument("--retrieval-only", action="store_true", help="train no ranker")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    if not 0 < options.held_out_days < options.days:
        parser.error(f"--held-out-days: {options.held_out_days} of {options.days} days; leave a day to train on")
    if options.retrieval_only:
        options.rankers = []
    elif IDS not in options.rankers:
        parser.error(f"--rankers: the differences are to {IDS!r}; name it, too")
    jobs = {job: job for job in (JOB, ALIGN_JOB, QUANTIZE_JOB)}
    begin_work("quality.larm", options, free=("seeds", "rankers", "retrieval_only"), contents=jobs)
    torch.set_num_threads(1)
    work = LarmWork(options)
    work.simulate()
    scores: dict[str, list[Scores]] = {variant: [] for variant in options.rankers}
    runs: dict[str, list[Path]] = {variant: [] for variant in TOWERS}
    with World.join("cpu") as world:
        for seed in options.seeds:
            for variant in TOWERS:
                print(f"two towers, {variant}, seed {seed}", file=sys.stderr, flush=True)
                runs[variant].append(work.towers(variant, seed))
            for variant in options.rankers:
                scores[variant].append(work.scores(variant, seed, world))
    groups = author_groups(work.world, work.job(IDS, options.seeds[0]))
    result: dict[str, Any] = {"retrieval": retrieval_result(runs, groups)}
    if scores:
        result["ranking"] = ranking_result(scores, groups, work.world)
    print(tables(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(result, options.out.with_suffix(".png"))
    facts = {
        "question": "LARM's parts on a simulated world with segment vectors, differences in points",
        "world": {name: getattr(options, name) for name in ("users", "days", "taste", "newcomers")},
        "held_out": "the last day" if options.held_out_days == 1 else f"the last {options.held_out_days} days",
        "levels": options.levels,
        "seeds": options.seeds,
        "draws": DRAWS,
        "towers": options.towers,
        "overrides": options.overrides,
        "load": os.getloadavg(),
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
