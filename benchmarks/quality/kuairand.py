"""Compare PLE with gradient-boosted trees on the real log KuaiRand-Pure, paired by user.

    python -m benchmarks.quality.kuairand --source KuaiRand-Pure --out benchmarks/results/kuairand.json

Trains ``configs/kuairand.toml`` with three seeds on the days before ``--from``, predicts the requests from ``--from``
until ``--until`` with statistics and histories frozen at the end of training, and compares with two LightGBM models
on the same rows, side features and frozen statistics:

* ``lightgbm-own``: 300 trees of 63 leaves, per behaviour, with the statistics of that behaviour;
* ``lightgbm-all``: 150 trees of 15 leaves, per behaviour, with the statistics of all behaviours.

The difference to each is bootstrapped over users (all rows of a user are drawn together, both models on the same draw).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pyarrow.parquet as pq

from benchmarks.measure import make_parser, run_limelight, write_result
from trainer.config.ranker import JobConfig, load_config
from trainer.data.features.dense_inputs import DenseInputs
from trainer.data.format.dataset import Dataset, freeze_statistics
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import read_rows
from trainer.data.loading.loader import freeze_rows
from trainer.metrics.user_bootstrap import ResampledMetric, draw_users, interval, resample_auc, resample_gauc
from trainer.ranking.setup import Split, split_in_time

JOB = "configs/kuairand.toml"
BEHAVIOURS = ("click", "long_view", "like", "profile_enter", "comment", "follow")
RESAMPLES = 1000

TREES: dict[str, dict[str, Any]] = {
    "lightgbm-own": {"n_estimators": 300, "num_leaves": 63},
    "lightgbm-all": {"n_estimators": 150, "num_leaves": 15},
}

Scores = dict[str, np.ndarray]
"""Behaviour -> score of each held-out row, in order of ``visit_id``."""


def train_ranker(data: Path, directory: Path, seed: int, options: argparse.Namespace) -> Scores:
    """Train and predict with one seed by the commands that a user types; return scores in order of ``visit_id``."""
    run, predictions = directory / f"seed-{seed}", directory / f"seed-{seed}.parquet"
    window = [f"data.eval_from={options.since}", f"data.eval_until={options.until}"]
    settings = [f"data.path={data}", f"run.directory={run}", f"run.seed={seed}", *window, *options.overrides]
    run_limelight("train", JOB, *settings, f"--ranks={options.ranks}")
    run_limelight("evaluate", run, f"--predictions={predictions}")
    table = pq.read_table(predictions).sort_by("visit_id")
    return {behaviour: table[f"p_{behaviour}"].to_numpy() for behaviour in BEHAVIOURS}


def tree_inputs(data: Dataset, split: Split, path: Path) -> tuple[Rows, Rows]:
    """Return training rows, and held-out rows in order of ``visit_id`` with the statistics at the end of training."""
    spec = data.spec
    training = read_rows(path, spec, emit_until=split.train_until)
    held_out = read_rows(path, spec, request_from=split.eval_from, request_until=split.eval_until)
    order = np.argsort(held_out["visit_id"])
    held_out = {name: column[order] for name, column in held_out.items()}
    held_out["stat"] = freeze_statistics(data, split.train_until).lookup(held_out)
    return training, held_out


def tree_dense(
    inputs: DenseInputs, data: Dataset, split: Split, training: Rows, held_out: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Return the dense inputs of training and held-out rows, ``[n, len(inputs.names)]`` each.

    Counts of past visits are those that the ranker has: as of each training row's request, and for held-out rows as of
    the end of training.
    """
    prior = np.clip(training["label"].mean(axis=0), 1e-6, 1 - 1e-6)
    ends = freeze_rows(held_out, split.train_until, None)
    return inputs.raw(training, prior, data.histories), inputs.raw(held_out, prior, data.histories, ends)


def fit_trees(name: str, config: JobConfig, data: Dataset, split: Split, training: Rows, held_out: Rows) -> Scores:
    """Return the scores of one LightGBM setting."""
    spec = data.spec
    inputs = DenseInputs(spec, config.features)
    dense = tree_dense(inputs, data, split, training, held_out)
    scores = {}
    for behaviour in BEHAVIOURS:
        columns = [
            k
            for k, column in enumerate(inputs.names)
            if name == "lightgbm-all"
            or not column.startswith(("stat:", "past:"))
            or column.endswith((f":{behaviour}", ":rows"))
        ]
        matrices = [
            np.concatenate([rows["side"].astype(np.float32), values[:, columns]], axis=1)
            for rows, values in zip((training, held_out), dense, strict=True)
        ]
        model = lightgbm.LGBMClassifier(
            **TREES[name], learning_rate=0.05, min_child_samples=50, n_jobs=os.cpu_count(), random_state=1, verbose=-1
        )
        categories = [k for k, side in enumerate(spec.side) if side.rows <= 256]
        label = training["label"][:, spec.behaviours.index(behaviour)]
        model.fit(matrices[0], label, categorical_feature=categories)
        scores[behaviour] = model.predict_proba(matrices[1])[:, 1]
    return scores


def compare(models: dict[str, list[Scores]], held_out: Rows, spec: DatasetSpec) -> dict[str, Any]:
    """Return the metrics of every model, means over its seeds, and the bootstrapped difference of the first to each."""
    index, counts = draw_users(held_out["user_id"], RESAMPLES, seed=1)
    result: dict[str, Any] = {}
    for behaviour in BEHAVIOURS:
        labels = held_out["label"][:, spec.behaviours.index(behaviour)]
        result[behaviour] = {"positives": int(labels.sum()), "rows": len(labels)}
        for metric, resample in (("auc", resample_auc), ("gauc", resample_gauc)):
            found = {
                name: _mean([resample(index, counts, scores[behaviour], labels) for scores in seeds])
                for name, seeds in models.items()
            }
            first, *others = found.items()
            result[behaviour][metric] = {
                name: {"mean": value.value, "standard_error": float(np.nanstd(value.draws))}
                for name, value in found.items()
            }
            result[behaviour][f"{metric}_difference"] = {
                name: {
                    "mean": first[1].value - other.value,
                    "interval_95": interval(first[1].draws - other.draws),
                    "standard_error": float(np.nanstd(first[1].draws - other.draws)),
                }
                for name, other in others
            }
    return result


def _mean(resampled: Sequence[ResampledMetric]) -> ResampledMetric:
    return ResampledMetric(float(np.mean([r.value for r in resampled])), np.mean([r.draws for r in resampled], axis=0))


def table(result: dict[str, Any]) -> str:
    """Return the comparison as a table."""
    lines = [f"{'behaviour':<15}{'metric':<7}{'model':<14}{'mean':>8}{'s.e.':>8}{'PLE - it':>10}   95 % interval"]
    for behaviour, found in result.items():
        for metric in ("auc", "gauc"):
            for name, value in found[metric].items():
                line = f"{behaviour:<15}{metric:<7}{name:<14}{value['mean']:>8.4f}{value['standard_error']:>8.4f}"
                difference = found[f"{metric}_difference"].get(name)
                if difference:
                    low, high = difference["interval_95"]
                    line += f"{difference['mean']:>+10.4f}   {low:+.4f} to {high:+.4f}"
                lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.kuairand", __doc__)
    parser.add_argument("--data", type=Path, help="imported dataset (default: import --source)")
    parser.add_argument(
        "--source", type=Path, default=os.environ.get("LIMELIGHT_KUAIRAND"), help="folder of KuaiRand-Pure"
    )
    parser.add_argument("--from", dest="since", default="2022-05-04", help="first held-out day (default: %(default)s)")
    parser.add_argument("--until", default="2022-05-06", help="end of the held-out days (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a training (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args(argv)
    if not options.data and not options.source:
        sys.exit("no data: give --data or --source, or set LIMELIGHT_KUAIRAND to a folder of KuaiRand-Pure")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        path = options.data or scratch / "kuairand"
        if not options.data:
            run_limelight("data", "import", "kuairand", options.source, path)
        window = [f"data.eval_from={options.since}", f"data.eval_until={options.until}"]
        config = load_config(JOB, [f"data.path={path}", *window, *options.overrides])
        data = Dataset.open(str(path))
        split = split_in_time(config, data.spec)
        training, held_out = tree_inputs(data, split, path)
        models: dict[str, list[Scores]] = {
            "ple": [train_ranker(path, scratch, seed, options) for seed in range(1, options.seeds + 1)],
            **{name: [fit_trees(name, config, data, split, training, held_out)] for name in TREES},
        }
        result = compare(models, held_out, data.spec)
    print(table(result))
    facts = {"question": "PLE against LightGBM on KuaiRand-Pure", "from": options.since, "until": options.until}
    facts |= {"seeds": options.seeds, "training_rows": len(training["visit_id"]), "resamples": RESAMPLES}
    write_result(options.out, {**facts, "result": result}, options.ranks)


if __name__ == "__main__":
    main()
