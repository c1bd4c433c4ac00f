"""Compare the report policies: time to react to a highlight, ranking, calibration and freshness.

One simulated world with known click probabilities that jump and fall (``benchmarks/moment/world.py``), and one model,
trained on its stream under each report policy: ``full`` with its real delay, ``fast_slow``, ``realtime`` and
``realtime_naive``. Every exposure is predicted when it is requested. Measured in the second hour of the stream:

* time to react: after the true click probability of a room jumps or falls, seconds until the mean prediction has
  covered half of it;
* AUC, GAUC and calibration of every behaviour, against labels and against the true probabilities;
* freshness: seconds from a behaviour to the row with its label, from the log; and to updated parameters, in real time.

The statistics logged with the rows contain a behaviour after its visit has ended: the main comparison leaves them out,
and a second one (``statistics``) has them. A third (``no_slow_rows``) has ``fast_slow`` without its second rows; two
more (``limit_1``, ``limit_2``) bound the importance weight of these rows (``labels.retraction_limit``).
Learning rates are the same for all policies, and were chosen on another world.

    python -m benchmarks.moment --work moment --out benchmarks/results/moment.json

runs all stages, ``tune``, ``train``, ``live`` and ``report``, in one to two hours on one core. A training that is in
``--work`` is not repeated; ``--policies`` and ``--at-most`` choose a part. ``live`` takes its minutes in real time for
each policy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kept_work import begin_work
from benchmarks.measure import make_parser, mean_and_half_width, write_result
from benchmarks.moment.freshness import label_delays, play
from benchmarks.moment.metrics import excess_loss, quality
from benchmarks.moment.plots import plot_reactions, plot_room
from benchmarks.moment.reactions import AGES_S, by_age, response, room_jumps, times
from benchmarks.moment.run import BASE, JOB, POLICIES, StreamPredictions, predict_stream, stream_job
from benchmarks.moment.world import BEHAVIOURS, WorldExposures, WorldSize, levels, read_exposures, write_world
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table
from trainer.runtime.distributed import World
from trainer.runtime.files import write_json

SIZE = WorldSize()
JUDGED_FROM_S = 3600.0
"""Slow rows come after an hour: only then every policy has all of its rows."""

TUNING_SIZE = WorldSize(stream_s=3000)
TUNING_SEED = 100
TUNED_FROM_S = 1200.0
TUNED_POLICIES = ("full", "fast_slow", "realtime")
RATES = {
    f"{optimizer} {tables} {dense}": (
        f"tables.optimizer={optimizer}",
        f"tables.learning_rate={tables}",
        f"optimizer.learning_rate={dense}",
    )
    for optimizer, tables, dense in (
        ("sgd", 10.0, 0.002),
        ("sgd", 30.0, 0.002),
        ("sgd", 100.0, 0.002),
        ("sgd", 30.0, 0.01),
        ("rowwise_adagrad", 0.05, 0.002),
        ("rowwise_adagrad", 0.2, 0.002),
    )
}
CHOSEN = "sgd 30.0 0.002"
"""Best excess log loss of clicks for ``full`` and, with 100, for ``realtime``; ``fast_slow`` has 2 % less at 100, and
the mean 0.7 %. Other optimizers and rates were tried under ``realtime`` alone."""

_NO_STATISTICS = "features.exclude=['stat:*']"
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "main": (POLICIES, (_NO_STATISTICS,)),
    "no_slow_rows": (("fast_slow",), (_NO_STATISTICS, "labels.slow_minutes=600")),
    "limit_1": (("fast_slow",), (_NO_STATISTICS, "labels.retraction_limit=1.0")),
    "limit_2": (("fast_slow",), (_NO_STATISTICS, "labels.retraction_limit=2.0")),
    "statistics": (("full", "fast_slow", "realtime"), ()),
}
"""Policies and settings: the comparison; ``fast_slow`` without its second row, and with a bounded weight of it; and
with the logged statistics."""


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        kind: name of its settings, and of its file.
        policy: report policy of the labels.
        seed: of the world and of the model.
        size: of the world.
        settings: changes to the job that all trainings share.
    """

    kind: str
    policy: str
    seed: int
    size: WorldSize
    settings: tuple[str, ...]

    def file(self, work: Path) -> Path:
        """Return the file of its predictions."""
        return work / f"{self.kind.replace(' ', '-')}-{self.policy}-{self.seed}.npz"


def tunings() -> Iterator[Training]:
    """Yield each setting of the tables under each policy, on a world that nothing else uses."""
    for kind, settings in RATES.items():
        for policy in TUNED_POLICIES:
            yield Training(kind, policy, TUNING_SEED, TUNING_SIZE, (_NO_STATISTICS, *settings))


def trainings(variants: Sequence[str], seeds: Sequence[int]) -> Iterator[Training]:
    """Yield each variant under its policies with each seed."""
    for variant in variants:
        policies, settings = VARIANTS[variant]
        for seed in seeds:
            for policy in policies:
                yield Training(variant, policy, seed, SIZE, (*settings, *RATES[CHOSEN]))


def world_of(work: Path, size: WorldSize, seed: int) -> Path:
    """Return the dataset of a world; write it if it is missing."""
    dataset = work / f"world-{size.stream_s}-{seed}"
    if not dataset.exists():
        write_world(dataset, size, seed)
    return dataset


def train_all(options: argparse.Namespace, world: World, wanted: Iterator[Training]) -> None:
    """Train what is missing in ``options.work``, under ``options.policies``, at most ``options.at_most`` models."""
    for training in wanted:
        file = training.file(options.work)
        if file.exists() or training.policy not in options.policies or not options.at_most:
            continue
        options.at_most -= 1
        dataset = world_of(options.work, training.size, training.seed)
        job = stream_job(dataset, training.size, training.policy, training.seed, training.settings)
        found = predict_stream(job, world)
        tmp_path = file.with_name(f"partial-{file.name}")
        facts = np.array(json.dumps(found.facts))
        np.savez(tmp_path, visit_id=found.visit_id, probability=found.probability, facts=facts)
        tmp_path.rename(file)
        print(f"{file.stem}: {found.facts['steps']:,} steps, {found.facts['rows']:,} rows", flush=True)


def read_predictions(file: Path) -> StreamPredictions:
    """Return the predictions of a training."""
    with np.load(file, allow_pickle=False) as arrays:
        return StreamPredictions(arrays["visit_id"], arrays["probability"], json.loads(str(arrays["facts"][()])))


def tune(options: argparse.Namespace, world: World) -> None:
    """Try every setting of the tables and print its loss."""
    train_all(options, world, tunings())
    for kind, losses in tuned(options.work).items():
        print(f"{kind:20}", "  ".join(f"{policy} {loss:.4f}" for policy, loss in losses.items()))


def tuned(work: Path) -> dict[str, dict[str, float]]:
    """Return the excess log loss of clicks by setting and policy, and their ``mean``, of finished trainings."""
    losses: dict[str, dict[str, float]] = {}
    for training in tunings():
        file = training.file(work)
        if file.exists():
            world = read_exposures(world_of(work, TUNING_SIZE, TUNING_SEED), TUNING_SIZE, TUNING_SEED)
            found = read_predictions(file)
            late = world.at_s[found.visit_id] >= TUNED_FROM_S
            truth = world.truth[found.visit_id[late], 0]
            losses.setdefault(training.kind, {})[training.policy] = excess_loss(found.probability[late, 0], truth)
    return {kind: {**by_policy, "mean": float(np.mean(list(by_policy.values())))} for kind, by_policy in losses.items()}


def train(options: argparse.Namespace, world: World) -> None:
    """Train every variant under every policy with every seed."""
    train_all(options, world, trainings(options.variants, range(1, options.seeds + 1)))


def live(options: argparse.Namespace, world: World) -> None:
    """Play minutes of the stream in real time under every policy."""
    dataset = world_of(options.work, SIZE, 1)
    size = replace(SIZE, stream_s=round(60 * options.minutes))
    for policy in options.policies:
        file = live_file(options, policy)
        if not file.exists():
            settings = (_NO_STATISTICS, *RATES[CHOSEN], "stream.speed=1.0")
            delays = play(stream_job(dataset, size, policy, 1, settings), world)
            write_json(file, {"minutes": options.minutes, **delays})


def live_file(options: argparse.Namespace, policy: str) -> Path:
    """Return the file of the delays of ``live`` under a policy, in so many minutes."""
    work: Path = options.work
    return work / f"live-{policy}-{options.minutes:g}.json"


def judge(world: WorldExposures, found: StreamPredictions, seed: int) -> dict[str, Any]:
    """Return all figures of one training."""
    probability = np.full(world.truth.shape, np.nan)
    probability[found.visit_id] = found.probability
    in_stream = (world.at_s >= 0) & (world.at_s < SIZE.stream_s)
    if not np.isfinite(probability[in_stream]).all():
        raise ValueError(f"seed {seed}: some exposures of the stream were not predicted")
    judged = in_stream & (world.at_s >= JUDGED_FROM_S)
    return {
        **follow(world, probability[:, 0], seed),
        "behaviours": {
            name: quality(world.user_id[judged], probability[judged, k], world.label[judged, k], world.truth[judged, k])
            for k, name in enumerate(BEHAVIOURS)
        },
        "predicted_true_by_age": by_age(levels(SIZE, seed), world, probability[:, 0], judged),
        "rows": found.facts["rows"],
        "steps": found.facts["steps"],
    }


def follow(world: WorldExposures, click: np.ndarray, seed: int) -> dict[str, Any]:
    """Return ``reaction`` and ``response`` of predicted click probabilities ``[exposures]`` to jumps, by kind of jump.

    ``reaction`` has of the times to react the mean ``seconds``, with the time until the next jump where that came
    first, the ``median``, and ``reached``, the share of jumps that were followed in time.
    """
    jumps = room_jumps(levels(SIZE, seed), world, JUDGED_FROM_S, float(SIZE.stream_s))
    reaction, curves = {}, {}
    for kind, rises in (("rises", True), ("falls", False)):
        of_kind = [jump for jump in jumps if jump.rises == rises]
        seconds = times(of_kind, world, click)
        longest = np.array([each.jump.until_s - each.jump.at_s for each in of_kind])
        reaction[kind] = {
            "jumps": len(of_kind),
            "seconds": float(np.minimum(seconds, longest).mean()),
            "median": float(np.median(seconds)),
            "reached": float(np.isfinite(seconds).mean()),
        }
        curves[kind] = response(of_kind, world, click)
    return {"reaction": reaction, "response": curves}


def summarise(seeds: Sequence[Any]) -> Any:
    """Return nested results with each number as ``mean`` and ``half_width_95`` over the seeds, and arrays as means."""
    first = seeds[0]
    if isinstance(first, Mapping):
        return {key: summarise([each[key] for each in seeds]) for key in first}
    if isinstance(first, list):
        return [summarise(list(each)) for each in zip(*seeds, strict=True)]
    if isinstance(first, np.ndarray):
        return [None if not np.isfinite(value) else round(float(value), 4) for value in np.mean(seeds, axis=0)]
    mean, half = mean_and_half_width(seeds)
    return {"mean": mean, "half_width_95": half}


def tables(result: Mapping[str, Any]) -> str:
    """Return the figures of one variant as tables."""
    reaction = [
        [
            policy,
            *(
                cell(found["reaction"][kind][measure], places)
                for kind in ("rises", "falls")
                for measure, places in (("seconds", 0), ("median", 0), ("reached", 2))
            ),
        ]
        for policy, found in result.items()
    ]
    header = ["policy", *(f"{kind}: {what}" for kind in ("rises", "falls") for what in ("mean s", "median s", "share"))]
    measures = ("auc", "gauc", "predicted_true", "predicted_observed", "ece_true", "ece_observed", "excess_loss")
    judged = [
        [policy, behaviour, *(cell(found["behaviours"][behaviour][measure], 4) for measure in measures)]
        for policy, found in result.items()
        for behaviour in BEHAVIOURS
    ]
    ages = [f"{low} to {high} s" for low, high in pairwise(AGES_S[:-1])]
    young = [
        [policy, *(cell(value, 2) for value in found["predicted_true_by_age"])] for policy, found in result.items()
    ]
    return "\n\n".join(
        [
            text_table(header, reaction),
            text_table(["policy", "behaviour", *measures], judged),
            text_table(["predicted / true by age of the room", *ages, "later"], young),
        ]
    )


def cell(value: Mapping[str, float | None], places: int) -> str:
    """Return a mean with its interval as text."""
    if value["mean"] is None:
        return "never"
    spread = "" if value["half_width_95"] is None else f" ±{value['half_width_95']:.{places}f}"
    return f"{value['mean']:.{places}f}{spread}"


def report(options: argparse.Namespace, world: World) -> None:
    """Evaluate finished trainings; print tables, write the JSON file and the pictures."""
    seeds = range(1, options.seeds + 1)
    worlds = {seed: read_exposures(world_of(options.work, SIZE, seed), SIZE, seed) for seed in seeds}
    result: dict[str, Any] = {}
    for variant in options.variants:
        judged: dict[str, list[Any]] = {}
        for training in trainings([variant], seeds):
            if training.file(options.work).exists():
                found = read_predictions(training.file(options.work))
                judged.setdefault(training.policy, []).append(judge(worlds[training.seed], found, training.seed))
        ordered = {policy: judged[policy] for policy in POLICIES if policy in judged}
        result[variant] = {
            policy: {"seeds": len(of_seeds), **summarise(of_seeds)} for policy, of_seeds in ordered.items()
        }
        print(f"\n{variant}\n\n{tables(result[variant])}")
    measured = summarise([follow(worlds[seed], worlds[seed].truth[:, 0], seed)["reaction"] for seed in seeds])
    dataset = world_of(options.work, SIZE, 1)
    delays = {policy: label_delays(stream_job(dataset, SIZE, policy, 1, ())) for policy in POLICIES}
    lives = {policy: live_file(options, policy) for policy in POLICIES}
    played = {policy: json.loads(file.read_text()) for policy, file in lives.items() if file.exists()}
    print(f"\nfrom a behaviour to the row with its label, seconds\n\n{delay_table(delays)}")
    print(f"\nfrom a behaviour to updated parameters, in real time, seconds\n\n{delay_table(played)}")
    if options.out is None:
        return
    write_result(
        options.out,
        {
            "question": "time to react, quality and freshness of the report policies on a stream",
            "world": vars(SIZE),
            "judged_from_s": JUDGED_FROM_S,
            "job": [*JOB, *RATES[CHOSEN]],
            "tuning": {"world": vars(TUNING_SIZE), "seed": TUNING_SEED, "excess_loss": tuned(options.work)},
            "variants": {name: settings for name, (_, settings) in VARIANTS.items()},
            "result": result,
            "reaction_of_the_true_probabilities": measured,
            "event_to_row_seconds": delays,
            "event_to_parameters_seconds": played,
        },
    )
    if "main" not in result:
        return
    plot_reactions(options.out.with_name(f"{options.out.stem}_reaction.png"), result["main"])
    first = worlds[1]
    at = np.flatnonzero((first.place == liveliest(first)) & (first.at_s >= JUDGED_FROM_S))
    click = {}
    for training in trainings(["main"], [1]):
        if training.file(options.work).exists():
            found = read_predictions(training.file(options.work))
            of_all = np.zeros(len(first.at_s))
            of_all[found.visit_id] = found.probability[:, 0]
            click[training.policy] = of_all[at]
    plot_room(options.out.with_name(f"{options.out.stem}_room.png"), first.at_s[at], first.truth[at, 0], click)


def liveliest(world: WorldExposures) -> int:
    """Return the place of the rooms whose click probability varies most in the time that is evaluated."""
    judged = world.at_s >= JUDGED_FROM_S
    places = range(int(world.place.max()) + 1)
    return max(places, key=lambda place: float(world.truth[judged & (world.place == place), 0].std()))


def delay_table(delays: Mapping[str, Any]) -> str:
    """Return quantiles of delays as a table, by policy and behaviour."""
    rows = []
    for policy, found in delays.items():
        for name in ("click", "gift"):
            of_name = found[name]
            for kind in ("yes", "no") if "yes" in of_name else ("",):
                quantiles = of_name[kind] if kind else of_name
                shown_quantiles = [f"{quantiles[key]}" for key in ("count", "p10", "p50", "p90", "p99")]
                rows.append([policy, f"{name} {kind}".strip(), *shown_quantiles])
    return text_table(["policy", "label", "count", "p10", "p50", "p90", "p99"], rows)


STAGES: dict[str, Callable[[argparse.Namespace, World], None]] = {
    "tune": tune,
    "train": train,
    "live": live,
    "report": report,
}


FREE = ("stages", "seeds", "variants", "policies", "at_most", "minutes")
"""Options that are in the names of the kept files, or choose among them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("moment", __doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (default: all, in order)")
    parser.add_argument("--work", type=local_argument, required=True, help="directory of worlds and predictions")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES, help="default: all")
    parser.add_argument("--at-most", type=int, default=1 << 30, metavar="N", help="train at most N models")
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="minutes of `live`, and of its part in `report` (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"no stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    begin_work("moment", options, free=FREE, contents={BASE: BASE})
    with World.join("cpu") as world:
        for stage in options.stages or STAGES:
            STAGES[stage](options, world)


if __name__ == "__main__":
    main()
