"""Add the systems of `make full` to one ranker, one at a time, and measure how near each comes to the best possible.

    python -m benchmarks.quality.full --work runs/full-systems --out benchmarks/results/full.json

The world and its tables are made by the commands of `make full`, which fit them on the first three days of the log. The
rankers are trained on the days after these, in one pass of shuffled rows, and evaluated on the last day.

The first network is logistic regression and the second PLE, with side features, statistics, ids and the latest visits.
Each further line keeps what the line before it has: Cross's searches and alignment, vectors of what rooms show, LARM's
codes and fused vectors of authors, Foresight's outputs and codes. In the last line, with Moment, the ranker of all of
these continues on the stream of the last day: it predicts each request before it learns from it. Settings of the
systems are those of ``configs/full.toml``, but for the steps of the stream.

AUC and GAUC of each behaviour are means over the seeds of the rankers, with 95 % intervals (Student's t); differences
have 95 % intervals over users (paired bootstrap). The share of the gap is 0 for logistic regression and 1 for the
world's true probabilities. These know what nobody can see, so there is a second bound, see
``benchmarks/quality/attainable_bound.py``.

Every finished part is kept under ``--work``, so the same command continues a benchmark that was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, run_limelight, slug, write_result
from benchmarks.quality.attainable_bound import DRAWS as HIDDEN_DRAWS
from benchmarks.quality.attainable_bound import kept_probabilities
from benchmarks.quality.full_report import (
    CROSS,
    FORESIGHT,
    LARM,
    LOGISTIC,
    MOMENT,
    SYSTEMS,
    VECTORS,
    Bounds,
    SystemRun,
    draw,
    summarise,
    tables,
)
from benchmarks.quality.full_tables import PLACES, in_place, make_tables
from benchmarks.quality.kept_runs import KeptTables, kept_facts
from benchmarks.quality.larm_report import Scores
from benchmarks.quality.paired_users import DRAWS
from benchmarks.quality.ranker_runs import continue_on_stream, trained_ranker
from trainer.config.load import read_job
from trainer.config.ranker import JobConfig, parse_config
from trainer.console.outputs import local_argument
from trainer.data.simulator.config import WorldConfig
from trainer.ranking.evaluation import Predictions, read_truth
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json

BASE_JOB, FULL_JOB = "configs/simulated.toml", "configs/full.toml"
USERS, DAYS, WORLD_SEED = 3000, 9, 1
FIRST_DAY = date(2024, 3, 4)
FITTED_DAYS = 3
"""Days on which the commands of `make full` fit the tables."""

SECTIONS: dict[str, tuple[str, ...]] = {
    CROSS: ("features.history", "features.search", "alignment", "model.attention_kind"),
    VECTORS: ("features.content.room",),
    LARM: ("features.codes.aligned", "features.content.fused"),
    FORESIGHT: ("features.codes.shown", "features.content.encoded", "features.content.foreseen"),
    MOMENT: ("stream", "labels"),
}
"""System -> its sections of ``configs/full.toml``. The vectors of the world stand for LCU's embeddings there."""

TRAINING = (
    "data.shuffle_minutes=360",
    "data.workers=0",
    "features.exclude=['weekday']",
    "train.batch_size=512",
    "train.device=cpu",
    "checkpoint.every_minutes=0",
)
"""Settings of all rankers. Without workers all of the work is in the processor time of this process. The log has no two
equal weekdays in its training range, so a weekday would be the name of a day."""

SEARCH_REFRESH_STEPS = 20
FLUSH_SECONDS = 600
STREAM_RATES = {"optimizer": 0.0005, "tables": 0.02}
"""Interval of the steps on the stream, and learning rates there. The ranker of the stream of ``configs/full.toml``
begins with initial weights, so it needs the large steps of an hour's rows and twice the rate of the dense network. Here
the stream continues a trained ranker: steps of ten minutes follow the latest rows sooner, and half the rate disturbs
less of what is learnt. Each request is predicted by the weights of the last step, so a mean of them changes nothing."""

LAST_STORED = SYSTEMS[SYSTEMS.index(MOMENT) - 1]
"""System whose ranker the stream continues."""


@dataclass(frozen=True)
class RankerFacts:
    """Rows and processor seconds of a ranker's training on stored rows, and on the stream of the last day."""

    rows: int
    seconds: float
    stream_rows: int = 0
    stream_seconds: float = 0.0


class FullWork:
    """Files of the benchmark, made when they are first needed.

    Args:
        options: of the command line.
        world: ranks, one.
    """

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self._options, self._ranks = options, world
        self._folder: Path = options.work
        self.dataset = self._folder / "data/full/world"
        self._tables = KeptTables(self._folder)
        self._eval_from = (FIRST_DAY + timedelta(days=options.days - 1)).isoformat()

    def make_tables(self) -> None:
        """Make the world and the tables, where they are missing."""
        options = self._options
        make_tables(self._folder, options.users, options.days, WORLD_SEED, run_limelight, options.tables)

    def system(self, name: str, seed: int) -> SystemRun | None:
        """Return the predictions of a system's ranker; None if it is not there and ``--finished`` is set."""
        scores, file = self._files(name, seed)
        if self._options.finished and not file.exists():
            return None
        key = self._key(name, seed)
        facts = kept_facts(file, key)
        if facts is None:
            if self._options.finished:
                return None
            self._train(name, seed)
            facts = kept_facts(file, key)
            assert facts is not None
        return SystemRun(Scores.read(scores), **facts)

    def _key(self, name: str, seed: int) -> str:
        """Return what identifies the training of a system: its jobs, the dataset, and the content of the tables."""
        # The stream continues the ranker of all other systems.
        names = (LAST_STORED, MOMENT) if name == MOMENT else (name,)
        return self._tables.key_of(*(self.job(each, seed, stream=each == MOMENT) for each in names))

    def job(self, name: str, seed: int, stream: bool) -> JobConfig:
        """Return the job of a system's ranker: the training on stored rows, or the stream of the last day."""
        raw = system_job(name, self._folder, [*TRAINING, f"run.seed={seed}", *self._options.overrides])
        full = read_job(FULL_JOB)
        begin = full["data"]["train_until"]
        raw["data"] |= {"path": str(self.dataset), "train_from": begin, "eval_from": self._eval_from}
        if not stream:
            return parse_config({key: raw[key] for key in raw if key not in SECTIONS[MOMENT]}, name)
        del raw["data"]["eval_from"]
        raw["data"]["train_until"] = self._eval_from
        raw["stream"]["flush_seconds"] = FLUSH_SECONDS
        # The end of a stream is unknown, so a schedule cannot fall towards it.
        rates = {section: {"learning_rate": rate} for section, rate in STREAM_RATES.items()}
        return parse_config(raw | rates, name)

    def bounds(self, scores: Scores) -> Bounds:
        """Return the true probabilities of the rows of ``scores``, and those that the past could reveal."""
        visit = scores.visit_id
        truth = read_truth(str(self.dataset), predictions_of(scores), scores.behaviours)
        assert truth is not None, f"{self.dataset} is no simulated world"
        config = WorldConfig(self._options.users, self._options.days, WORLD_SEED, lookahead=True)
        kept = kept_probabilities(self._folder / "attainable.npz", config, visit, truth.numpy(), scores.behaviours)
        return Bounds(truth.numpy(), kept)

    def _train(self, name: str, seed: int) -> None:
        """Train the ranker of a system, and keep its predictions."""
        # The stream continues the ranker of all other systems, so one training gives the last two lines.
        name = LAST_STORED if name == MOMENT else name
        print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
        with trained_ranker(self.job(name, seed, stream=False), self._ranks) as ranker:
            facts = RankerFacts(ranker.rows, ranker.seconds)
            scores = Scores.of(ranker.predict(), ranker.features.behaviours, ranker.seconds)
            if name == LAST_STORED:
                print(f"{MOMENT}, seed {seed}", file=sys.stderr, flush=True)
                stream = continue_on_stream(ranker, self.job(MOMENT, seed, stream=True))
                # Rows and labels are those of the held-out day; only the predictions are those of the stream.
                order = np.argsort(stream.visit_id)
                line = order[np.searchsorted(stream.visit_id, scores.visit_id, sorter=order)]
                assert np.array_equal(stream.visit_id[line], scores.visit_id), "the stream has all requests of the day"
                streamed = replace(scores, probability=stream.probability[line])
                self._keep(
                    MOMENT, seed, streamed, replace(facts, stream_rows=stream.rows, stream_seconds=stream.seconds)
                )
            self._keep(name, seed, scores, facts)

    def _keep(self, name: str, seed: int, scores: Scores, facts: RankerFacts) -> None:
        of_scores, of_facts = self._files(name, seed)
        of_scores.parent.mkdir(parents=True, exist_ok=True)
        # Predictions of one job must never stand beside the facts of another.
        of_facts.unlink(missing_ok=True)
        scores.write(of_scores)
        # Last, since a part with its facts is whole.
        write_json(of_facts, vars(facts) | {"key": self._key(name, seed)})

    def _files(self, name: str, seed: int) -> tuple[Path, Path]:
        """Return the files of a system's predictions and facts."""
        place = self._folder / f"seed-{seed}" / slug(name)
        return place.with_suffix(".npz"), place.with_suffix(".json")


def system_job(name: str, folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Return the job of a system, not validated: the base, and the sections of all systems up to this one.

    Args:
        name: one of ``SYSTEMS``.
        folder: directory with the tables of `make full`.
        settings: of all systems.
    """
    full, raw = read_job(FULL_JOB), read_job(BASE_JOB, settings)
    if name == LOGISTIC:
        raw["model"]["kind"] = "logistic"
    for path in (path for system in SYSTEMS[: SYSTEMS.index(name) + 1] for path in SECTIONS.get(system, ())):
        *parents, last = path.split(".")
        source, target = full, raw
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    if "search" in raw["features"]:
        raw["features"]["search"]["refresh_steps"] = SEARCH_REFRESH_STEPS
    located: dict[str, Any] = _in_place(folder, raw)
    return located


def predictions_of(scores: Scores) -> Predictions:
    """Return scores as the predictions that they were made from."""
    visit = torch.from_numpy(scores.visit_id)
    columns = {name: torch.from_numpy(getattr(scores, name)) for name in ("probability", "label", "mask")}
    return Predictions(torch.from_numpy(scores.user_id), visit, torch.zeros_like(visit), **columns)


def _in_place(folder: Path, value: Any) -> Any:
    """Return settings with the places of `make full` below a folder."""
    if isinstance(value, dict):
        return {key: _in_place(folder, inner) for key, inner in value.items()}
    return in_place(folder, value) if isinstance(value, str) and value.startswith(PLACES) else value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.full", __doc__)
    parser.add_argument(
        "--work", type=local_argument, default=Path("runs/full-systems"), help="keeps all parts (default: %(default)s)"
    )
    parser.add_argument("--users", type=int, default=USERS, help="users of the world (default: %(default)s)")
    parser.add_argument("--days", type=int, default=DAYS, help="days of the world, 5 or more (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the rankers (default: 1 to 3)")
    parser.add_argument("--finished", action="store_true", help="train nothing; report the seeds that are finished")
    parser.add_argument("--tables", nargs="*", default=[], metavar="COMMAND:KEY=VALUE", help="settings of the commands")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all rankers")
    options = parser.parse_args(argv)
    if options.days < FITTED_DAYS + 2:
        parser.error(
            f"--days: {options.days}; the tables take {FITTED_DAYS} days, and a day of training and one after it"
        )
    begin_work("quality.full", options, free=("seeds", "finished", "overrides"), contents={FULL_JOB: FULL_JOB})
    torch.set_num_threads(1)
    seeds: list[dict[str, SystemRun]] = []
    with World.join("cpu") as world:
        work = FullWork(options, world)
        if not options.finished:
            work.make_tables()
        for seed in options.seeds:
            runs = {name: run for name in SYSTEMS if (run := work.system(name, seed)) is not None}
            # A comparison needs all systems of a seed.
            if len(runs) == len(SYSTEMS):
                seeds.append(runs)
    if not seeds:
        sys.exit("limelight: error: no seed has all of its systems yet; the same command without --finished continues")
    result = summarise(seeds, work.bounds(seeds[0][LOGISTIC].scores))
    print(tables(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(result, options.out.with_suffix(".png"))
    facts = {
        "question": "systems added to one ranker, one at a time, beside the best possible and an attainable bound",
        "world": {"users": options.users, "days": options.days, "seed": WORLD_SEED, "fitted_days": FITTED_DAYS},
        "seeds": len(seeds),
        "draws": DRAWS,
        "hidden_draws": HIDDEN_DRAWS,
        "overrides": options.overrides,
    }
    write_result(options.out, {**facts, **result})


if __name__ == "__main__":
    main()
