"""Change one setting of the default ranker's recipe at a time, and measure what it adds in a simulated world.

    limelight data simulate data/recipe --users 3000 --days 10 --partitions 8 --seed 1 --segment-vectors
    limelight data simulate data/recipe-videos --users 3000 --days 10 --partitions 8 --seed 1 --segment-vectors \
        --video-rows
    python -m benchmarks.quality.recipe --data data/recipe --videos data/recipe-videos --work runs/recipe \
        --out benchmarks/results/recipe.json

Each recipe is ``configs/simulated.toml`` with a few changes, and is compared with another recipe that lacks one of
them. Recipes are chosen on the *tuning* days, the two days before the last two; the training ends where they begin. The
chosen one (``configs/recipe.toml``), the default and logistic regression are then trained on all days before the *held
out* days, the last two.

Values are means over the seeds of the ranker, with 95 % intervals (Student's t). Differences are in points, with 95 %
intervals over users (paired bootstrap, the mean over the seeds inside each draw). Rows a second are by processor time
of the training. On the held-out days, the share of the gap is 0 for logistic regression and 1 for the attainable bound
of ``benchmarks/quality/attainable_bound.py``.

Recipes with rows of videos are trained on another dataset of the same world (``--videos``), and evaluated on the same
rows of rooms; without it they are left out.

Each training is kept under ``--work`` and is not repeated, so the same command continues a benchmark that was stopped.
One with other settings or another dataset is trained again. ``--days``, ``--recipes`` and ``--seeds`` choose a part;
the report has all trainings that are kept. The vectors of segments change nothing else of the world.

In a world of ``--factors``, ``--runs DIRECTORY`` writes each training of the held-out days as a run with these rows,
for ``benchmarks.quality.gap``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import make_parser, slug, write_result
from benchmarks.quality.attainable_bound import ATTAINABLE, VARIANTS, kept_probabilities, world_of
from benchmarks.quality.full import predictions_of
from benchmarks.quality.kept_runs import Recipe, read_runs, run_file, settings_of, train_once
from benchmarks.quality.larm_report import Scores
from benchmarks.quality.paired_users import DRAWS
from benchmarks.quality.recipe_report import BEST, summarise, tables
from benchmarks.quality.run_of_scores import write_run
from trainer.config.ranker import JobConfig, load_config
from trainer.console.errors import UserError
from trainer.console.outputs import local_argument
from trainer.data.format.schema import DatasetSpec
from trainer.ranking.evaluation import read_truth
from trainer.runtime.distributed import World

JOB, RECIPE_JOB = "configs/simulated.toml", "configs/recipe.toml"
TUNING, HELD_OUT = "tuning", "held out"
DAYS: dict[str, tuple[str, ...]] = {
    TUNING: ("data.eval_from=2024-03-10", "data.eval_until=2024-03-12"),
    HELD_OUT: ("data.eval_from=2024-03-12",),
}
"""Part of the log -> its settings; the world has ten days from 2024-03-04."""

COMMON = ("data.workers=0", "train.device=cpu", "checkpoint.every_minutes=0")
"""Settings of all trainings. Without workers all of the work is in the processor time of this process."""

DEFAULT, LOGISTIC = "default", "logistic regression"
TAGS, TAGS_HEADS, HEADS = "tags and author features", "tags, multi_head", "multi_head"
AUTHORS, SMALL_BATCHES = "author histories", "author histories, batch 512"
FIRST = "author histories, batch 512, CGC"
PAST_TAG, PAST = "counts by tag", "counts by tag, of the user, by author"
ON_AIR = "counts, what is on air"
CHOSEN = "counts, lately too"
VIDEO_ROWS, ONE_ITEM = "counts, rows of videos", "counts, one row for all items"
_TAGS = ("features.tags=true", 'features.author_side=["author_category", "author_genre"]')
_AUTHORS = (
    "features.history.author={domain='video', search='author', length=10}",
    "features.history.author_live={domain='live', search='author', length=10}",
)
_TAG = 'features.past.tag={same="tag"}'
LIVE_ONLY = 'data.eval_domains=["live"]'
"""Setting of the recipes with rows of videos."""

RECIPES: dict[str, Recipe] = {
    DEFAULT: Recipe("", ()),
    LOGISTIC: Recipe(DEFAULT, ('model.kind="logistic"',)),
    TAGS: Recipe(DEFAULT, _TAGS),
    HEADS: Recipe(DEFAULT, ('model.attention_kind="multi_head"',)),
    TAGS_HEADS: Recipe(HEADS, _TAGS),
    "latest visits of both domains": Recipe(TAGS_HEADS, ("features.history.session={domain='both', length=10}",)),
    "latest watched visits": Recipe(
        TAGS_HEADS, ("features.history.liked={domain='both', require=['effective_view'], length=30}",)
    ),
    "author histories, tags, multi_head": Recipe(TAGS_HEADS, _AUTHORS),
    AUTHORS: Recipe(DEFAULT, _AUTHORS),
    "no user id": Recipe(DEFAULT, ('features.exclude=["user_id"]',)),
    "smoothing 3": Recipe(DEFAULT, ("features.smoothing=3.0",)),
    "table rate 0.02": Recipe(DEFAULT, ("tables.learning_rate=0.02",)),
    "table rate 0.1": Recipe(DEFAULT, ("tables.learning_rate=0.1",)),
    "dense rate 0.004": Recipe(DEFAULT, ("optimizer.learning_rate=0.004",)),
    "two epochs": Recipe(DEFAULT, ("train.epochs=2",)),
    "batch 512": Recipe(DEFAULT, ("train.batch_size=512",)),
    "batch 256": Recipe(DEFAULT, ("train.batch_size=256",)),
    "CGC": Recipe(DEFAULT, ('model.kind="cgc"',)),
    # As they were measured: compiled attention was no default then, and is one now.
    SMALL_BATCHES: Recipe(AUTHORS, ("train.batch_size=512", "model.compiled_attention=true")),
    FIRST: Recipe(SMALL_BATCHES, ('model.kind="cgc"',)),
    PAST_TAG: Recipe(FIRST, (_TAG,)),
    PAST: Recipe(PAST_TAG, ("features.past.user={}", 'features.past.author={same="author"}')),
    CHOSEN: Recipe(
        PAST,
        (
            'features.past.tag_day={same="tag", half_life_minutes=1000}',
            'features.past.tag_now={same="tag", half_life_minutes=20}',
            "features.past.now={half_life_minutes=20}",
        ),
    ),
    "counts, two epochs": Recipe(CHOSEN, ("train.epochs=2",)),
    # The rooms of the held-out days are new, so the rows of their ids are not trained.
    ONE_ITEM: Recipe(CHOSEN, ('features.item={ids="hash", rows=2}',)),
    "counts, one row for all items, two epochs": Recipe(ONE_ITEM, ("train.epochs=2",)),
    "counts, weights of rare behaviours": Recipe(CHOSEN, ("train.weights={like=2, comment=2, gift=3, follow=2}",)),
    "counts, dcn": Recipe(CHOSEN, ('model.kind="dcn"', "model.dcn_rank=32")),
    VIDEO_ROWS: Recipe(CHOSEN, (LIVE_ONLY,)),
    "counts, rows of videos, counts in rooms": Recipe(
        VIDEO_ROWS,
        (
            'features.past.tag_live={same="tag", domain="live"}',
            'features.past.user_live={domain="live"}',
            'features.past.author_live={same="author", domain="live"}',
        ),
    ),
    ON_AIR: Recipe(CHOSEN, ('features.content.air={table="DATA/embeddings/segments", of="segment"}',)),
    "counts, what is on air, rate 0.004": Recipe(ON_AIR, ("optimizer.learning_rate=0.004",)),
}
"""All recipes; ``DATA`` in a setting stands for the dataset."""
FINAL = (DEFAULT, LOGISTIC, FIRST, CHOSEN)
"""Recipes of the held-out days."""


def reads_videos(recipe: str) -> bool:
    """True if a recipe is trained on the rows of videos, too."""
    return LIVE_ONLY in settings_of(RECIPES, recipe)


def job_of(recipe: str, days: str, seed: int, data: str, overrides: Sequence[str] = (), videos: str = "") -> JobConfig:
    """Return the job of a training; ``videos`` is the dataset with rows of videos, if there is one."""
    data = videos or data if reads_videos(recipe) else data
    own = (f"data.path={data}", f"run.seed={seed}", *COMMON, *DAYS[days], *overrides)
    settings = [setting.replace("DATA/", f"{data}/") for setting in settings_of(RECIPES, recipe)]
    return load_config(JOB, [*settings, *own])


def train_missing(options: argparse.Namespace, world: World) -> None:
    """Train what is missing in ``options.work``, seed by seed."""
    for days in options.days:
        recipes = [name for name in options.recipes if days == TUNING or name in FINAL]
        recipes = [name for name in recipes if options.videos or not reads_videos(name)]
        for seed, recipe in ((seed, recipe) for seed in options.seeds for recipe in recipes):
            job = job_of(recipe, days, seed, options.data, options.overrides, options.videos)
            file = run_file(options.work / slug(days), seed, recipe)
            train_once(file, job, world, f"{recipe}, {days} days, seed {seed}")


def bounds(options: argparse.Namespace, scores: Scores) -> dict[str, np.ndarray]:
    """Return the attainable and the true probabilities of the rows of ``scores``, ``[n, behaviours]`` each.

    They are kept in ``options.work``.
    """
    truth = read_truth(options.data, predictions_of(scores), scores.behaviours)
    if truth is None:
        sys.exit(f"limelight: error: {options.data}: has no true probabilities, so it is no simulated world")
    file, config = options.work / "attainable.npz", world_of(DatasetSpec.load(options.data))
    wanted = {ATTAINABLE: VARIANTS[ATTAINABLE]}
    kept = kept_probabilities(file, config, scores.visit_id, truth.numpy(), scores.behaviours, wanted)
    return {**kept, BEST: truth.numpy()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.recipe", __doc__)
    parser.add_argument("--data", required=True, metavar="PATH", help="dataset of `limelight data simulate`")
    parser.add_argument(
        "--videos",
        default="",
        metavar="PATH",
        help="the same world with rows of videos (default: leave such recipes out)",
    )
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/recipe"), help="keeps all trainings (default: %(default)s)"
    )
    parser.add_argument("--days", nargs="+", choices=DAYS, default=list(DAYS), help="default: both")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the rankers (default: 1 to 3)")
    parser.add_argument(
        "--runs", type=local_argument, metavar="DIRECTORY", help="write the held-out rows of each training as a run"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with World.join("cpu") as world:
        train_missing(options, world)
    result: dict[str, Any] = {}
    for days in DAYS:

        def job(recipe: str, seed: int, days: str = days) -> JobConfig:
            return job_of(recipe, days, seed, options.data, options.overrides, options.videos)

        runs = read_runs(options.work / slug(days), RECIPES, job)
        if days == HELD_OUT and options.runs is not None:
            try:
                for name, of_seeds in runs.items():
                    for seed, kept in of_seeds.items():
                        write_run(options.runs / slug(name) / f"seed-{seed}", job(name, seed), kept.scores)
            except UserError as error:
                sys.exit(f"limelight: error: {error}")
        if DEFAULT in runs:
            than = {name: RECIPES[name].than for name in runs}
            first = next(iter(runs[DEFAULT].values())).scores
            final = days == HELD_OUT and LOGISTIC in runs
            result[slug(days)] = summarise(
                runs, than, DEFAULT, LOGISTIC if final else None, bounds(options, first) if final else {}
            )
            print(f"{days} days\n\n{tables(result[slug(days)])}\n")
    if not result:
        sys.exit(f"limelight: error: no training of the recipe {DEFAULT!r} is finished yet; the same command continues")
    extra = DatasetSpec.load(options.data).extra
    facts = {
        "question": "changes to the default ranker's recipe in a simulated world, one at a time",
        "world": {name: extra[name] for name in ("users", "days", "seed")},
        "draws": DRAWS,
        "chosen": CHOSEN,
        "settings": {name: found.settings for name, found in RECIPES.items()},
        "overrides": options.overrides,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
