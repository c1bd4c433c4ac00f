"""Measure which factors of a simulated world a ranker does not know, from its AUC to the best possible.

    limelight data simulate data/factors --users 3000 --days 10 --partitions 8 --seed 1 --factors
    python -m benchmarks.quality.gap runs/simulated-20261129-151913 --data data/factors

In a simulated world the log-odds of a behaviour are a sum of factors, such as the user's taste for the item or the mood
of the session. This benchmark takes the predictions of a run's held-out rows and tells them one factor: a logistic
regression on the run's log-odds and the factor's effect (``world_factors.py``). It is fitted on four fifths of the
users and used on the last fifth, in turn (``gap_fit.py``). What AUC, GAUC and log loss gain is what the run did not
know of this factor. Each factor is told alone, and then all one after the other, in a greedy order: the next one is the
factor that promises the largest fall of the log loss by a score test on the held-out residuals. The order ends where
the held-out log loss no longer falls; then all others are told at once.

The first line is the run as it is, the second one the run after such a regression without a factor. Gains are relative
to the second line: what calibration alone gives belongs to no factor. The last line is the true probability. It is more
than a sum of effects, so the last step remains when all factors are told.

A factor is told exactly, and no model can know all of it. ``--attainable`` adds the best that the events before each
request could tell; ``benchmarks/quality/attainable_bound.py`` has its assumptions. It takes some minutes, and is kept
in a file. The distance from the run to this bound has an interval over users. If the run is above the bound by more
than this noise, the bound is too low, and the tables say so.

``--estimates`` tells, beside each true factor, its best estimate from the events before the request
(``benchmarks/quality/estimated_factors.py``), and all estimates at once. What the run gains from an estimate is what
the past says of this factor and the run does not know.

Several runs with the same held-out rows, such as seeds of one job, are measured together: values are means with 95 %
intervals over the runs (Student's t), and gains have 95 % intervals over users (paired bootstrap).

Rows are those that the run has kept (``held_out.parquet``). A run without them is evaluated again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import make_parser, mean_and_half_width, run_limelight, write_result
from benchmarks.quality.attainable_bound import (
    ATTAINABLE,
    TOLERANCE,
    VARIANTS,
    exceeds,
    kept_probabilities,
    room_below,
    world_of,
)
from benchmarks.quality.estimated_factors import with_estimates
from benchmarks.quality.gap_fit import FOLDS, cross_fit, folds_of, greedy_order, log_loss, log_odds_of, reason_to_skip
from benchmarks.quality.gap_report import draw, tables
from benchmarks.quality.world_factors import WorldFactors
from trainer.checkpoint.run_directory import load_run
from trainer.console.errors import UserError
from trainer.console.outputs import local_argument
from trainer.data.format.carried_dataset import dataset_of
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.config import BEHAVIOURS
from trainer.metrics.behaviour_metrics import auc, grouped_auc
from trainer.metrics.user_bootstrap import ResampledMetric, draw_users, interval, resample_auc
from trainer.ranking.held_out_rows import HELD_OUT
from trainer.report.held_out import HeldOutRows

DRAWS = 200
"""Draws of users of an interval."""


@dataclass(frozen=True)
class Gap:
    """Held-out rows of runs with what is true of them, in the order of ``visit_id``.

    Attributes:
        runs: rows of each run; all have the same visits and labels.
        factors: of the rows.
        truth: ``[n, K]`` true probabilities of the runs' behaviours.
        attainable: ``[n, K]`` attainable probabilities; None if they are not wanted.
        estimates: the factors with estimates in place of the hidden ones; None if they are not wanted.
    """

    runs: list[HeldOutRows]
    factors: WorldFactors
    truth: np.ndarray
    attainable: np.ndarray | None
    estimates: WorldFactors | None = None

    def measure(self) -> dict[str, Any]:
        """Return the gap of each behaviour, and the reason why there is none of some of them."""
        first = self.runs[0]
        effects = self.factors.effects(first.behaviours)
        estimated = effects if self.estimates is None else self.estimates.effects(first.behaviours)
        behaviours, left_out = {}, {}
        for k, behaviour in enumerate(first.behaviours):
            rows = np.flatnonzero(first.mask[:, k] > 0)
            reason = reason_to_skip(first.label[rows, k], folds_of(first.user_id[rows]))
            if reason is None:
                print(f"{behaviour}: {len(rows):,} rows", file=sys.stderr, flush=True)
                behaviours[behaviour] = self._of_behaviour(k, rows, effects[k], estimated[k])
            else:
                left_out[behaviour] = reason
        return {"behaviours": behaviours, "left_out": left_out}

    def _of_behaviour(
        self, k: int, rows: np.ndarray, effects: Mapping[str, np.ndarray], estimated: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """Return all lines of a behaviour.

        Args:
            k: column of the behaviour.
            rows: those in which the behaviour could happen.
            effects: group of factors -> its effect, ``[n]``.
            estimated: the same of the estimates.
        """
        first = self.runs[0]
        label, user_id = first.label[rows, k], first.user_id[rows]
        fold = folds_of(user_id)
        terms = {name: effect[rows] for name, effect in effects.items() if np.ptp(effect[rows]) > 0}
        runs = [log_odds_of(run.probability[rows, k]) for run in self.runs]

        def told(names: Sequence[str], of: Mapping[str, np.ndarray] = terms) -> list[np.ndarray]:
            return [cross_fit([run, *(of[name] for name in names)], label, fold) for run in runs]

        def line(log_odds: Sequence[np.ndarray]) -> dict[str, Any]:
            return {
                "auc": mean_and_half_width([auc(one, label) for one in log_odds]),
                "gauc": mean_and_half_width([grouped_auc(user_id, one, label) for one in log_odds]),
                "log_loss": mean_and_half_width([log_loss(one, label) for one in log_odds]),
            }

        calibrated = told([])
        index, counts = draw_users(user_id, DRAWS, seed=1)
        before = [resample_auc(index, counts, one, label) for one in calibrated]
        alone = {}
        for name in terms:
            with_factor = told([name])
            after = [resample_auc(index, counts, one, label) for one in with_factor]
            alone[name] = line(with_factor) | {"auc_gain": _gain(before, after)}
        past = {}
        if self.estimates is not None:
            guesses = {name: estimated[name][rows] for name in terms if name in estimated}
            for name in guesses:
                after = [resample_auc(index, counts, one, label) for one in told([name], guesses)]
                alone[name]["estimate_gain"] = _gain(before, after)
            after = [resample_auc(index, counts, one, label) for one in told(list(guesses), guesses)]
            past["estimates_gain"] = _gain(before, after)
        order = greedy_order(runs, terms, label, fold)
        steps = [{"factor": name, **line(told(order[: place + 1]))} for place, name in enumerate(order)]
        bounds = {"best possible": self.truth}
        room = {}
        if self.attainable is not None:
            bounds[ATTAINABLE] = self.attainable
            below = room_below(self.attainable[rows, k], runs, label, user_id)
            room = {"room": asdict(below), "above_attainable": exceeds(below)}
        return {
            "rows": len(rows),
            "positives": int(label.sum()),
            "run": line(runs),
            "calibrated": line(calibrated),
            "alone": dict(sorted(alone.items(), key=lambda item: item[1]["log_loss"][0])),
            "steps": steps,
            "others": [name for name in terms if name not in order],
            "all": line(told([*order, *(name for name in terms if name not in order)])),
            "bounds": {name: line([log_odds_of(values[rows, k])]) for name, values in bounds.items()},
            **room,
            **past,
        }


def _gain(before: Sequence[ResampledMetric], after: Sequence[ResampledMetric]) -> dict[str, float | None]:
    """Return the difference of a metric in points, mean over the runs, with its interval over users."""
    pairs = list(zip(before, after, strict=True))
    low, high = interval(np.mean([100 * (new.draws - old.draws) for old, new in pairs], axis=0))
    known = np.isfinite(low) and np.isfinite(high)
    mean = float(np.mean([100 * (new.value - old.value) for old, new in pairs]))
    return {"mean": mean, "low": low if known else None, "high": high if known else None}


def read_gap(
    directories: Sequence[str], data: str | None, attainable: Path | None, estimates: Path | None = None
) -> Gap:
    """Read the rows of runs, and what is true of them.

    Args:
        directories: of the runs.
        data: dataset with the factors; None for that of the runs.
        attainable: file that keeps the attainable probabilities; None to have none.
        estimates: file that keeps the estimates of the factors; None to have none.

    Raises:
        UserError: a run has no rows, the runs have different rows, or the dataset has no factors of them.
    """
    runs = [_rows_of(directory, data) for directory in directories]
    for directory, run in zip(directories, runs, strict=True):
        if not len(run.visit_id):
            raise UserError(f"{directory}: has no held-out rows")
        same = run.behaviours == runs[0].behaviours and np.array_equal(run.visit_id, runs[0].visit_id)
        if not same or not np.array_equal(run.label, runs[0].label):
            raise UserError(f"{directory}: has other held-out rows than {directories[0]}; name runs of one dataset")
    first = runs[0]
    path = dataset_of(directories[0], load_run(directories[0]).data.path, data)
    factors = WorldFactors.read(path, first.user_id, first.visit_id, first.request_ms)
    unknown = [name for name in first.behaviours if name not in BEHAVIOURS]
    if unknown:
        raise UserError(f"{directories[0]}: no simulated world has the behaviour {unknown[0]!r}")
    columns = [BEHAVIOURS.index(name) for name in first.behaviours]
    truth = factors.probabilities(factors.log_odds())[columns].T
    if first.truth is not None and not np.allclose(first.truth, truth, atol=TOLERANCE):
        raise UserError(
            f"{path}: its factors do not give the true probabilities of {directories[0]}; it is another world"
        )
    possible = None if attainable is None else _attainable(attainable, path, first, truth)
    if estimates is None:
        return Gap(runs, factors, truth, possible)
    guessed = with_estimates(estimates, world_of(DatasetSpec.load(path)), first.visit_id, factors)
    return Gap(runs, factors, truth, possible, guessed)


def _rows_of(directory: str, data: str | None) -> HeldOutRows:
    """Return the held-out rows that a run has kept, or those of a new evaluation, by ``visit_id``."""
    load_run(directory)
    try:
        found = HeldOutRows.read(Path(directory))
    except FileNotFoundError:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / HELD_OUT
            run_limelight("evaluate", directory, "--predictions", file, *(["--data", data] if data else []))
            found = HeldOutRows.read(Path(folder))
    return found.take(np.argsort(found.visit_id, kind="stable"))


def _attainable(file: Path, path: str, rows: HeldOutRows, truth: np.ndarray) -> np.ndarray:
    """Return the attainable probabilities of rows, ``[n, K]``; they are computed once and kept in a file."""
    wanted = {ATTAINABLE: VARIANTS[ATTAINABLE]}
    return kept_probabilities(file, world_of(DatasetSpec.load(path)), rows.visit_id, truth, rows.behaviours, wanted)[
        ATTAINABLE
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the whole result.

    Raises:
        UserError: the runs or the dataset cannot be measured.
    """
    gap = read_gap(options.runs, options.data, options.attainable, options.estimates)
    found = gap.measure()
    if not found["behaviours"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found["left_out"].items())
        raise UserError(f"{options.runs[0]}: no behaviour can be measured ({reasons})")
    config = load_run(options.runs[0])
    extra = DatasetSpec.load(dataset_of(options.runs[0], config.data.path, options.data)).extra
    return {
        "question": "factors of a simulated world that a ranker does not know",
        "world": {name: extra[name] for name in ("users", "days", "seed")},
        "model": config.model.kind,
        "runs": len(gap.runs),
        "rows": len(gap.runs[0].visit_id),
        "users": len(np.unique(gap.runs[0].user_id)),
        "folds": FOLDS,
        "draws": DRAWS,
        "order": "greedy, by the score test on held-out residuals",
        **found,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.gap", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a ranker's run; all with the same rows")
    parser.add_argument("--data", metavar="PATH", help="dataset with factors (default: the dataset of the runs)")
    parser.add_argument(
        "--attainable",
        type=local_argument,
        metavar="FILE.npz",
        help="measure the attainable bound, too; the file keeps it for the next time",
    )
    parser.add_argument(
        "--estimates",
        type=local_argument,
        metavar="FILE.npz",
        help="tell the best estimates of the factors, too; the file keeps them for the next time",
    )
    options = parser.parse_args(argv)
    try:
        result = run(options)
    except UserError as error:
        sys.exit(f"limelight: error: {error}")
    print(tables(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(result, options.out.with_suffix(".png"))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
