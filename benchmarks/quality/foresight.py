"""Measure Foresight: the predictor beside simple rules and the world's truth, and the ranker with its forecasts.

    python -m benchmarks.quality.foresight --work runs/foresight --out benchmarks/results/foresight.json

A world is simulated with segment vectors; half of the live authors open their first room on a random day. The log has
three parts. The predictors are trained on the days before the first border, and foresee the two days after it. The
rankers are trained on the days between both borders, and evaluated on those after the second one.

Predictor: codebooks of several sizes, of vectors with several noises, and the world's true topics as codes. Predictor
and rules foresee the same rows: a sample of those of authors that the training has seen, and one of those of other
authors. The seeds are those of the predictors. Intervals are Student's t over
the seeds.

Ranker: the forecasts of one predictor as features, the pooled output I of the encoder, the output D of the decoder, and
both. Beside them are four ceilings: no content, the true topic of the author's last ended segment, the true
distribution of the topic that follows it (Bayes forecast), and the topic on air at the request, which nobody can know.
Intervals are over users (paired bootstrap), means over the seeds of the rankers.

Every finished part is kept under ``--work``, so the same command continues a benchmark that was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, run_limelight, slug, write_result
from benchmarks.quality.foresight_report import (
    ALL,
    NO_CONTENT,
    RANKERS,
    SEEN,
    UNSEEN,
    VECTOR,
    Setting,
    draw,
    make_settings,
    predictor_result,
    ranker_result,
    tables,
)
from benchmarks.quality.foresight_world import (
    CEILINGS,
    TRUTH,
    write_ceiling,
    write_leaking_world,
    write_noisy_world,
    write_topic_codes,
)
from benchmarks.quality.kept_runs import KeptTables, kept_facts, train_once
from benchmarks.quality.larm_report import Scores
from benchmarks.quality.paired_users import DRAWS
from trainer.config.foresight import ForesightConfig, load_foresight
from trainer.config.ranker import JobConfig, load_config
from trainer.console.outputs import local_argument
from trainer.data.format.content_vectors import SEGMENT_VECTORS
from trainer.data.simulator.config import DAY_MS, START_MS, WorldConfig
from trainer.data.simulator.segment_truth import nearest_centroid, reference_accuracy
from trainer.data.simulator.segment_vectors import DEFAULT_NOISE
from trainer.data.simulator.write_dataset import simulate
from trainer.foresight import run_job
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json
from trainer.runtime.preemption import Preemption
from trainer.semantic_ids.foresight_baselines import Baselines
from trainer.semantic_ids.foresight_data import ForesightData
from trainer.semantic_ids.foresight_model import TrainedPredictor
from trainer.semantic_ids.foresight_report import measure

PREDICTOR_JOB, RANKER_JOB, QUANTIZE_JOB = (
    "configs/foresight.toml",
    "benchmarks/quality/larm.toml",
    "configs/quantize.toml",
)
USERS, DAYS, NEWCOMERS, PARTITIONS, WORLD_SEED = 3000, 10, 0.5, 4, 1
BORDERS = (4, 8)
"""Days from the start of the log to the first and to the second border."""

FORESEEN_DAYS = 2
ITERATIONS = 10
"""Passes of k-means; the distortion changes by less than 1 % after them."""

REFERENCE_DRAWS = 256
NEVER = "2030-01-01"
"""Time after the end of the log."""


class ForesightWork:
    """Files of the benchmark, made when they are first needed.

    Args:
        options: of the command line.
        world: ranks, one.
    """

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self._options, self._ranks = options, world
        self._folder: Path = options.work
        self._tables = KeptTables(self._folder)
        self.settings = make_settings(options.codes, options.noises, DEFAULT_NOISE)
        if options.settings:
            self.settings = {name: self.settings[name] for name in options.settings}

    def world(self, noise: float = DEFAULT_NOISE) -> Path:
        """Return the world with some noise of the segment vectors."""
        path = self._folder / f"world-{noise}"
        options = self._options
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        if noise == DEFAULT_NOISE:
            simulate(
                path, options.users, options.days, PARTITIONS, WORLD_SEED, segment_noise=noise, newcomers=NEWCOMERS
            )
        else:
            config = WorldConfig(options.users, options.days, WORLD_SEED, newcomers=NEWCOMERS)
            write_noisy_world(self.world(), path, config, noise)
        return path

    def codes(self, setting: Setting) -> tuple[Path, Path]:
        """Return the codebook and the code file of a setting."""
        codebook, file = (
            self._folder / f"{what}-{setting.codes or 'topics'}-{setting.noise}{suffix}"
            for what, suffix in (("codebook", ""), ("codes", ".parquet"))
        )
        if file.exists():
            return codebook, file
        world = self.world(setting.noise)
        if not codebook.exists() and setting.codes:
            settings = [f"data.path={world}", f"data.fit_until={self._day(0)}", f"codebook.levels=[{setting.codes}]"]
            settings += [
                f"codebook.directory={codebook}",
                f"codebook.iterations={ITERATIONS}",
                'codebook.start="random"',
            ]
            run_limelight("quantize", QUANTIZE_JOB, *settings)
        if setting.codes:
            run_limelight("quantize", "assign", codebook, world, file)
        else:
            write_topic_codes(world, codebook, file)
        return codebook, file

    def rules(self, name: str) -> dict[str, Any] | None:
        """Return the quality of the rules on the rows of a setting, and the best possible accuracy.

        This and the next two methods return None if ``--finished`` is set and the part is not there.
        """
        setting = self.settings[name]
        days = "-all-days" if setting.every_day else ""
        file = self._folder / f"rules-{setting.codes or 'topics'}-{setting.noise}-{setting.target}{days}.json"
        if not file.exists():
            if self._options.finished:
                return None
            data, parts = self._foreseen(name)
            baselines = Baselines(data.rows, data.training, data.codes, data.truth)
            found: dict[str, Any] = {
                "rows": {ALL: len(data.held_out), SEEN: int((~data.of_unseen_authors(data.held_out)).sum())},
                "training": len(data.training),
                "persistence": float((data.rows.code[data.held_out] == data.rows.target[data.held_out]).mean()),
                "quality": {
                    group: {rule: quality.document() for rule, quality in baselines.measure(part).items()}
                    for group, part in parts.items()
                },
            }
            times = data.held_out_times
            if setting.codes and setting.target == "next" and times is not None:
                best = reference_accuracy(
                    self.world(setting.noise),
                    nearest_centroid(data.centroids.numpy()),
                    from_ms=times.from_ms,
                    until_ms=times.until_ms,
                    targets=self._options.reference_targets,
                    draws=REFERENCE_DRAWS,
                )
                found["reference"] = asdict(best)
            write_json(file, found)
        return read(file)

    def predictor(self, name: str, seed: int) -> dict[str, Any] | None:
        """Return the quality of a setting's predictor with a seed."""
        run = self._run(name, seed)
        file = run.with_suffix(".json")
        if self._options.finished and not file.exists():
            return None
        job = self._job(name, seed, NEVER)
        key = self._tables.key_of(job)
        facts = kept_facts(file, key)
        if facts is not None or self._options.finished:
            return facts
        if file.exists():
            # A predictor of another job, and what was made with it.
            file.unlink()
            for made in (run, run.parent / "forecasts"):
                shutil.rmtree(made, ignore_errors=True)
        print(f"predictor, {name}, seed {seed}", file=sys.stderr, flush=True)
        started = time.process_time()
        run_job(job, self._ranks, Preemption())
        seconds = time.process_time() - started
        data, parts = self._foreseen(name)
        model = TrainedPredictor.open(run)
        predictor, runs = model.predictor(), model.config.data.runs
        quality = {
            group: measure(predictor, data, part, runs, self._ranks.device).document() for group, part in parts.items()
        }
        facts = {"quality": quality, "seconds": seconds}
        write_json(file, facts | {"key": key})
        return facts

    def scores(self, variant: str, seed: int) -> Scores | None:
        """Return the predictions of a ranker."""
        file = self._scores_file(variant, seed)
        if self._options.finished and not file.exists():
            return None
        job = self._ranker_job(variant, seed)
        key = self._tables.key_of(job)
        if self._options.finished and kept_facts(file, key) is None:
            return None
        train_once(file, job, self._ranks, f"ranker, {variant}, seed {seed}", key)
        return Scores.read(file.with_suffix(".npz"))

    def _day(self, border: int, more: int = 0) -> str:
        """Return the date of a border, some days later."""
        return f"2024-03-{4 + self._options.borders[border] + more:02d}"

    def _run(self, name: str, seed: int) -> Path:
        return self._folder / f"seed-{seed}" / f"predictor-{slug(name)}"

    def _job(self, name: str, seed: int, eval_from: str) -> ForesightConfig:
        setting = self.settings[name]
        codebook, codes = self.codes(setting)
        return load_foresight(
            PREDICTOR_JOB,
            [
                f"data.path={self.world(setting.noise)}",
                f"data.codes={codes}",
                f"data.codebook={codebook}",
                f"data.target={setting.target}",
                f"data.train_from={'' if setting.every_day else self._day(0, -self._options.train_days)}",
                f"data.train_until={self._day(0)}",
                f"data.eval_from={eval_from}",
                f"data.eval_until={'' if eval_from == NEVER else self._day(0, FORESEEN_DAYS)}",
                f"run.directory={self._run(name, seed)}",
                f"run.seed={seed}",
                "train.epochs=1",
                'train.device="cpu"',
                *setting.overrides,
                *self._options.predictor,
            ],
        )

    def _foreseen(self, name: str) -> tuple[ForesightData, dict[str, np.ndarray]]:
        """Return the data of a setting, and a sample of the held-out rows of each group of authors."""
        data = ForesightData.open(self._job(name, 0, self._day(0)))
        unseen = data.of_unseen_authors(data.held_out)
        parts = {}
        for group, rows in ((SEEN, data.held_out[~unseen]), (UNSEEN, data.held_out[unseen])):
            count = min(self._options.rows, len(rows))
            parts[group] = np.sort(np.random.default_rng(WORLD_SEED).choice(rows, count, replace=False))
        return data, parts

    def _table(self, name: str) -> Path:
        """Return a table of segment vectors, a ceiling or a forecast."""
        if name == VECTOR:
            return self.world() / SEGMENT_VECTORS
        if name in CEILINGS:
            table = self._folder / f"ceiling-{slug(name)}"
            if not table.exists():
                write_ceiling(self.world(), name, table, START_MS + self._options.borders[0] * DAY_MS)
            return table
        seed = self._options.seeds[0]
        forecasts = self._folder / f"seed-{seed}" / "forecasts"
        if not forecasts.exists():
            best = next(name for name, setting in self.settings.items() if setting.every_day and setting.codes)
            self.predictor(best, seed)
            run_limelight("foresight", "forecast", self._run(best, seed), "--out", forecasts)
        return forecasts / name

    def _scores_file(self, variant: str, seed: int) -> Path:
        """Return the file of a ranker's facts; with forecasts, it has the seed of their predictor in its name."""
        name = f"ranker-{slug(variant)}"
        if not {VECTOR, *CEILINGS}.issuperset(RANKERS[variant]):
            name += f"-forecasts-{self._options.seeds[0]}"
        return self._folder / f"seed-{seed}" / f"{name}.json"

    def _ranker_job(self, variant: str, seed: int) -> JobConfig:
        world = self.world()
        if variant == TRUTH:
            world = self._folder / "leaking-world"
            if not world.exists():
                write_leaking_world(self.world(), world)
        overrides = [
            f"data.path={world}",
            f"data.train_from={self._day(0)}",
            f"data.eval_from={self._day(1)}",
            f"run.seed={seed}",
        ]
        for number, name in enumerate(RANKERS[variant]):
            key = f"features.content.room{number}"
            overrides += [f"{key}.table={self._table(name)}", f'{key}.of="segment"']
        return load_config(RANKER_JOB, [*overrides, *self._options.ranker])


def read(file: Path) -> dict[str, Any]:
    """Return the content of a finished part."""
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.foresight", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/foresight"), help="keeps all parts (default: %(default)s)"
    )
    parser.add_argument("--users", type=int, default=USERS, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=DAYS, help="days of the world (default: %(default)s)")
    parser.add_argument(
        "--borders", type=int, nargs=2, default=BORDERS, help="days to both borders (default: %(default)s)"
    )
    parser.add_argument("--train-days", type=int, default=1, help="days of a predictor's rows (default: %(default)s)")
    parser.add_argument("--codes", type=int, nargs=3, default=[256, 2000, 20_000], help="codes, the usual ones second")
    parser.add_argument("--noises", type=float, nargs="+", default=[0.4, 1.6], help="further noises of the vectors")
    parser.add_argument("--rows", type=int, default=4000, help="foreseen rows of each group (default: %(default)s)")
    parser.add_argument("--reference-targets", type=int, default=500, help="segments of the best possible accuracy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the models (default: 1 to 5)")
    parser.add_argument("--ranker-seeds", type=int, nargs="+", help="of the rankers (default: as --seeds)")
    parser.add_argument("--finished", action="store_true", help="compute nothing; report the parts that are finished")
    parser.add_argument("--settings", nargs="+", help="names of the predictors' settings (default: all)")
    parser.add_argument("--rankers", nargs="*", choices=RANKERS, default=list(RANKERS), help="default: all")
    parser.add_argument("--predictor", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all predictors")
    parser.add_argument("--ranker", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    if options.rankers and NO_CONTENT not in options.rankers:
        parser.error(f"--rankers: the differences are to {NO_CONTENT!r}; name it, too")
    names = make_settings(options.codes, options.noises, DEFAULT_NOISE)
    if unknown := set(options.settings or names) - set(names):
        parser.error(f"--settings: there is no {sorted(unknown)}; choose from {list(names)}")
    jobs = {job: job for job in (QUANTIZE_JOB, PREDICTOR_JOB, RANKER_JOB)}
    free = ("seeds", "ranker_seeds", "finished", "settings", "rankers")
    begin_work("quality.foresight", options, free, jobs)
    torch.set_num_threads(1)
    scores: dict[str, list[Any]] = {variant: [] for variant in options.rankers}
    with World.join("cpu") as ranks:
        work = ForesightWork(options, ranks)
        of_seeds = [{name: work.predictor(name, seed) for name in work.settings} for seed in options.seeds]
        predictors = {name: [runs[name] for runs in of_seeds if runs[name]] for name in work.settings}
        rules = {name: work.rules(name) for name in work.settings}
        for seed in options.ranker_seeds or options.seeds:
            # A comparison needs all variants of a seed.
            of_seed = {variant: work.scores(variant, seed) for variant in options.rankers}
            for variant, found in of_seed.items():
                if None not in of_seed.values():
                    scores[variant].append(found)
    result: dict[str, Any] = {"predictor": predictor_result(work.settings, rules, predictors)}
    if options.rankers and scores[NO_CONTENT]:
        result["ranker"] = ranker_result(scores)
    print(tables(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(result, options.out.with_suffix(".png"))
    facts_of = ("users", "days", "borders", "train_days", "rows", "reference_targets", "predictor", "ranker")
    facts = {
        "question": "Foresight's predictor beside rules and truth, and rankers with its forecasts, in points",
        **{name: getattr(options, name) for name in facts_of},
        "newcomers": NEWCOMERS,
        "foreseen_days": FORESEEN_DAYS,
        "draws": DRAWS,
        "ranker_seeds": len(scores[NO_CONTENT]) if options.rankers else 0,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
