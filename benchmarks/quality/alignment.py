"""Measure what aligning a user's histories adds, by the correlation of interests in videos and in rooms.

    python -m benchmarks.quality.alignment --out benchmarks/results/alignment.json

Moment&Cross aligns the histories of a user with each other (equation 6), so that interest in short videos helps to rank
live rooms. Here the worlds (``limelight data simulate --interest-correlation``) differ in one number: how much the two
interests have in common. In each world a ranker of live rooms (``benchmarks/quality/alignment.toml``, histories of
videos, of rooms and of long views in both) is trained with and without the loss, and without any video in its
histories: what videos add without the loss is what there is to gain. Users are cut into those with few and with many
live visits before the held-out days, with half of the held-out rows each.

Weight and temperature of the loss, and what histories say of a visit (ids only, or tags and author features too), are
tried on the *tuning* days, the two days before the last two, where interests have a correlation of 0.9. The *held out*
days are the last two. Differences are in points, with 95 % intervals over users (paired bootstrap, the mean over the
seeds inside each draw).

Worlds and trainings are kept under ``--work`` and are not repeated, so the same command continues a benchmark that was
stopped; the report has all trainings that are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, slug, write_result
from benchmarks.quality.alignment_report import ALIGNED, GROUPS, NO_VIDEOS, NONE, draw, tables
from benchmarks.quality.attainable_bound import world_of
from benchmarks.quality.full import predictions_of
from benchmarks.quality.kept_runs import KeptRun, Recipe, read_runs, run_file, select, settings_of, train_once
from benchmarks.quality.paired_users import DRAWS, UserMetric, on_all_users
from benchmarks.quality.recipe import COMMON, DAYS, HELD_OUT, TUNING
from benchmarks.quality.recipe_report import summarise
from trainer.config.load import parse_time
from trainer.config.ranker import JobConfig, load_config
from trainer.console.outputs import local_argument
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.population import make_genres, make_users
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking.evaluation import read_truth
from trainer.runtime.distributed import World

JOB = "benchmarks/quality/alignment.toml"
USERS, WORLD_DAYS, PARTITIONS, WORLD_SEED = 2000, 10, 8, 1

WORLDS: dict[str, float | None] = {"0": 0.0, "0.5": 0.5, "0.9": 0.9, "default": None}
"""Name of a world -> its correlation."""
TUNING_WORLD = "0.9"

HISTORIES = {
    "short": "domain='video', length=20",
    "author": "domain='video', search='author', length=10",
    "live": "domain='live', length=20",
    "mixed": "domain='both', require=['long_view'], length=20",
}
"""Histories of Moment&Cross without its searches over thousands of visits, which users of this world do not have."""


def _histories(*names: str, domain: str = "both") -> tuple[str, ...]:
    """Return the settings of some histories; ``domain`` is that of the mixed one."""
    return tuple(f"features.history.{name}={{{HISTORIES[name].replace('both', domain)}}}" for name in names)


def _loss(weight: float, temperature: float = 0.1) -> tuple[str, ...]:
    return 'alignment.anchor="mixed"', f"alignment.weight={weight}", f"alignment.temperature={temperature}"


WEIGHT, TEMPERATURE = 0.0001, 0.1
"""Chosen on the tuning days."""
TRIED = [(weight, 0.1) for weight in (0.0001, 0.001, 0.01)] + [(0.001, temperature) for temperature in (0.03, 0.3)]
IDS = "ids only, no author history"
_TAGS = ("features.tags=true", 'features.author_side=["author_category", "author_genre"]')

VARIANTS: dict[str, Recipe] = {
    NONE: Recipe("", (*_TAGS, *_histories(*HISTORIES))),
    ALIGNED: Recipe(NONE, _loss(WEIGHT, TEMPERATURE)),
    NO_VIDEOS: Recipe("", (*_TAGS, *_histories("live", "mixed", domain="live"))),
}
"""Rankers of the held-out days, and what each is compared with; all without one are compared with the first."""

TUNED: dict[str, Recipe] = {
    NONE: VARIANTS[NONE],
    NO_VIDEOS: VARIANTS[NO_VIDEOS],
    **{f"weight {w}, temperature {t}": Recipe(NONE, _loss(w, t)) for w, t in TRIED},
    IDS: Recipe("", _histories("short", "live", "mixed")),
    **{f"{IDS}, weight {w}": Recipe(IDS, _loss(w)) for w in (0.0001, 0.001, 0.01)},
}
"""Rankers of the tuning days."""
RANKERS = {TUNING: TUNED, HELD_OUT: VARIANTS}


def job_of(name: str, days: str, seed: int, data: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Return the job of a training."""
    own = (f"data.path={data}", f"run.seed={seed}", *COMMON, *DAYS[days], *overrides)
    return load_config(JOB, [*settings_of(RANKERS[days], name), *own])


def world_path(work: Path, name: str) -> Path:
    """Return the dataset of a world."""
    return work / f"world-{slug(name)}"


def train_missing(options: argparse.Namespace, world: World) -> None:
    """Simulate and train what is missing in ``options.work``, seed by seed."""
    for days in options.days:
        worlds = [TUNING_WORLD] if days == TUNING else options.worlds
        for name in worlds:
            if not (path := world_path(options.work, name)).exists():
                options.work.mkdir(parents=True, exist_ok=True)
                size = (options.users, WORLD_DAYS, PARTITIONS, WORLD_SEED)
                simulate(path, *size, interest_correlation=WORLDS[name])
        for seed, name, ranker in ((s, n, r) for s in options.seeds[days] for n in worlds for r in RANKERS[days]):
            file = run_file(folder_of(options.work, days, name), seed, ranker)
            job = job_of(ranker, days, seed, world_path(options.work, name), options.overrides)
            train_once(file, job, world, f"{ranker}, correlation {name}, {days} days, seed {seed}")


def folder_of(work: Path, days: str, name: str) -> Path:
    """Return the folder of the trainings of some days in a world."""
    return work / slug(days) / slug(name)


def kept(options: argparse.Namespace, days: str, name: str) -> dict[str, dict[int, KeptRun]]:
    """Return the finished trainings of some days in a world: ranker -> seed -> run."""
    path = world_path(options.work, name)
    if not path.exists():
        return {}

    def job(ranker: str, seed: int) -> JobConfig:
        return job_of(ranker, days, seed, path, options.overrides)

    return read_runs(folder_of(options.work, days, name), RANKERS[days], job)


def live_visits_before(path: Path, days: str, users: np.ndarray) -> np.ndarray:
    """Return the number of live visits of each of ``users [n]`` that ended before the days."""
    spec = DatasetSpec.load(path)
    begin = load_config(JOB, [f"data.path={path}", *DAYS[days]]).data.eval_from
    rows = read_rows(path, spec, columns=["user_id"], emit_until=parse_time(begin, spec.timezone, "data.eval_from"))
    return np.bincount(rows["user_id"], minlength=int(users.max()) + 1)[users]


def groups_of(visits: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows ``[n] bool`` of each group of users; ``visits [n]`` are those of the user of each row.

    The limit is the largest number with which few visits are at most half of the rows.
    """
    few = visits <= np.quantile(visits, 0.5, method="lower")
    if few.mean() > 0.5:
        few = visits < visits[few].max()
    return dict(zip(GROUPS, (np.ones(len(visits), bool), few, ~few), strict=True))


def measured(path: Path, runs: Mapping[str, Mapping[int, KeptRun]]) -> dict[str, Any]:
    """Return by group of users what the variants give on the held-out days of a world."""
    first = next(iter(runs[NONE].values())).scores
    visits = live_visits_before(path, HELD_OUT, first.user_id)
    truth = read_truth(str(path), predictions_of(first), first.behaviours)
    if truth is None:
        sys.exit(f"limelight: error: {path}: has no true probabilities, so it is no simulated world")
    found: dict[str, Any] = {}
    for group, rows in groups_of(visits).items():
        of_group = {
            name: {seed: KeptRun(select(run.scores, rows), run.rows, run.seconds) for seed, run in seeds.items()}
            for name, seeds in runs.items()
        }
        than = {name: VARIANTS[name].than or NONE for name in of_group}
        users, place = np.unique(first.user_id[rows], return_inverse=True)
        found[group] = {
            "users": len(users),
            "live_visits": float(np.mean(visits[rows][np.unique(place, return_index=True)[1]])),
            **summarise(of_group, than, NONE, None, {}),
        }
        for k, behaviour in enumerate(first.behaviours):
            known = first.mask[rows, k] > 0
            metric = UserMetric(place[known], truth.numpy()[rows, k][known], first.label[rows, k][known])
            found[group]["behaviours"][behaviour]["best_auc"] = on_all_users(metric.auc, len(users))
    return found


def correlation_of(path: Path) -> float:
    """Return the correlation of the interests of a world's users, the mean over the numbers of the vectors."""
    config = world_of(DatasetSpec.load(path))
    video, live = make_users(config, make_genres(config)).vector
    return float(np.mean([np.corrcoef(video[:, d], live[:, d])[0, 1] for d in range(video.shape[1])]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.alignment", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/alignment"), help="keeps all (default: %(default)s)"
    )
    parser.add_argument("--users", type=int, default=USERS, help="users of the worlds (default: %(default)s)")
    parser.add_argument("--days", nargs="+", choices=DAYS, default=list(DAYS), help="default: both")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the rankers (default: 1 to 3)")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[1], help="on the tuning days (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    options.seeds = {TUNING: options.tuning_seeds, HELD_OUT: options.seeds}
    begin_work("quality.alignment", options, free=("days", "worlds", "seeds", "tuning_seeds", "overrides"))
    torch.set_num_threads(1)
    with World.join("cpu") as world:
        train_missing(options, world)
    result: dict[str, Any] = {"worlds": {}}
    if NONE in (tuned := kept(options, TUNING, TUNING_WORLD)):
        result["tuning"] = summarise(tuned, {name: TUNED[name].than or NONE for name in tuned}, NONE, None, {})
    for name in WORLDS:
        runs, path = kept(options, HELD_OUT, name), world_path(options.work, name)
        if NONE in runs:
            result["worlds"][name] = {"correlation": correlation_of(path), "groups": measured(path, runs)}
    print(tables(result))
    facts = {
        "question": "gain of aligned histories against the correlation of interests in videos and in rooms",
        "world": {"users": options.users, "days": WORLD_DAYS, "seed": WORLD_SEED},
        "draws": DRAWS,
        "chosen": {"weight": WEIGHT, "temperature": TEMPERATURE},
        "tuning_world": TUNING_WORLD,
        "overrides": options.overrides,
    }
    write_result(options.out, {**facts, **result})
    if options.out and result["worlds"]:
        draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
