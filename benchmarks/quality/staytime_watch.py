"""Measure what the video's duration and watch times add to the prediction of seconds in the comments, by base.

    python -m benchmarks.quality.staytime_watch --work build/staytime --kuairand DATASET \\
      --out benchmarks/results/staytime_watch.json
    python -m benchmarks.quality.staytime_watch --work build/staytime --parts tuning

Every base is trained with other inputs: without the duration; with it; with the duration and the watch times of the
user's earlier visits; with a predicted watch time of this visit, as a feature or as a joint task; and with all but the
feature. The datasets are the simulated world of ``benchmarks.quality.staytime``, with LCU and without, and an imported
KuaiRand, whose stays and watch times are real. The dataset's own features of the duration are left out, so that one
feature tells it. D2Q and PCR have the duration in their loss besides.

``--parts tuning`` compares numbers of earlier visits and weights of the joint task on the last day before the held-out
ones, with WLR; the settings of the other parts were chosen there, for all bases. Cells, ``--work`` and ``--minutes``
are as in ``benchmarks.quality.staytime``; a difference is between cells of one seed, with Student's t over the seeds of
the training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import make_parser, mean_and_half_width, write_result
from benchmarks.quality.staytime import (
    BASE_ALONE,
    DAYS,
    LOSSES,
    NO_CELLS,
    NO_KUAIRAND,
    StaytimeCell,
    data_paths,
    prepare,
    run_cells,
)
from benchmarks.quality.staytime_report import Summary, differences, means
from trainer.console.outputs import local_argument
from trainer.console.text_table import text_table

PARTS = ("tuning", "inputs", "LCU")
PAST_VISITS, WEIGHT = 200, 0.1
"""Settings of all parts but ``tuning``."""

DURATION = ("input.duration=true",)
PAST = (*DURATION, f"input.past_watch={PAST_VISITS}")
INPUTS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "duration": DURATION,
    "past": PAST,
    "predicted": (*DURATION, "watch.task=feature", f"watch.weight={WEIGHT}"),
    "joint": (*DURATION, "watch.task=joint", f"watch.weight={WEIGHT}"),
    "past and joint": (*PAST, "watch.task=joint", f"watch.weight={WEIGHT}"),
}
"""Inputs of a cell -> settings. ``duration`` is compared with ``nothing``, the others with ``duration``."""

TUNED: dict[str, tuple[str, ...]] = {
    "duration": DURATION,
    **{f"past {visits}": (*DURATION, f"input.past_watch={visits}") for visits in (10, 50, 200)},
    **{
        f"joint {weight}": (*DURATION, "watch.task=joint", f"watch.weight={weight}") for weight in (0.03, 0.1, 0.3, 1.0)
    },
}
OWN_DURATIONS = {
    "world": (
        'input.exclude=["city_tier", "device", "gender", "age_band", "spend_band", "user_tenure", "author_tenure", '
        '"author_category", "author_genre", "fans_band", "duration_band"]',
    ),
    "kuairand": ('input.exclude=["duration_bucket", "log_duration"]', "train.epochs=1", "train.learning_rate=5e-3"),
}
"""Dataset -> settings: the features of the duration that the dataset has, and one epoch, see ``watch.task``."""
TUNING_DAYS = {
    "world": ("data.eval_from=2024-03-15", "data.eval_until=2024-03-16"),
    "kuairand": ("data.eval_from=2022-05-03", "data.eval_until=2022-05-04"),
}
SHOWN = ("rmse", "mae_opened", "xauc", "gauc")


def watch_cells(options: argparse.Namespace, words: Path) -> Iterator[StaytimeCell]:
    """Yield the cells of all parts."""
    for dataset in ("world", *(["kuairand"] if options.kuairand else [])):
        for seed in range(1, options.seeds + 1):
            for name, settings in TUNED.items():
                yield _cell("tuning", dataset, f"wlr {name}", seed, (*settings, *TUNING_DAYS[dataset]), None)
            for loss in options.losses:
                for name, settings in INPUTS.items():
                    yield _cell("inputs", dataset, f"{loss} {name}", seed, settings, None)
                    if dataset == "world":
                        yield _cell("LCU", dataset, f"{loss} {name}", seed, settings, words)


def _cell(part: str, dataset: str, name: str, seed: int, settings: Sequence[str], words: Path | None) -> StaytimeCell:
    loss = f"base.loss={name.split()[0]}"
    alone = () if words else BASE_ALONE
    return StaytimeCell(f"{part} {dataset}", name, seed, (*OWN_DURATIONS[dataset], loss, *alone, *settings), words)


def summarise_inputs(results: Sequence[Mapping[str, Any]]) -> Summary:
    """Return by part and cell the means over the seeds, and the differences to the cell that it is compared with.

    ``explained`` is the share of the variance of log watch times that a cell predicts; only cells that predict them
    have it. The first cell of a part has the metrics of the true expectation, if it is known.
    """
    cells: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for result in results:
        cells.setdefault(result["part"], {}).setdefault(result["name"], {})[result["seed"]] = result["metrics"]
    summary: Summary = {}
    for part, of_part in cells.items():
        summary[part] = {}
        for name, seeds in of_part.items():
            entry: dict[str, Any] = {"seeds": len(seeds), "all": means(seeds, lambda metrics: metrics["all"])}
            loss, inputs = name.split(maxsplit=1)
            against = f"{loss} {'nothing' if inputs == 'duration' else 'duration'}"
            other = of_part.get(against, {}) if inputs != "nothing" else {}
            shared = {seed: (metrics, other[seed]) for seed, metrics in seeds.items() if seed in other}
            if shared:
                entry |= {"against": against, "difference": differences(shared, lambda metrics: metrics["all"])}
            first = next(iter(seeds.values()))
            if "watch" in first:
                entry["explained"] = mean_and_half_width([metrics["watch"]["explained"] for metrics in seeds.values()])
            if "truth" in first and name == next(iter(of_part)):
                entry["truth"] = first["truth"]
            summary[part][name] = entry
    return summary


def print_summary(summary: Summary) -> None:
    """Print every part as a table: the differences, and the means of the cells that are compared with no other."""

    def cell(values: Sequence[float | None], sign: bool) -> str:
        mean, half = values
        if mean is None:
            return "-"
        return f"{mean:{'+' if sign else ''}.4f}" + ("" if half is None else f" ±{half:.4f}")

    for part, cells in summary.items():
        lines = []
        for name, entry in cells.items():
            compared = "difference" in entry
            figures = entry["difference" if compared else "all"]
            explained = cell(entry["explained"], False) if "explained" in entry else ""
            shown = (cell(figures[metric], compared) for metric in SHOWN)
            lines.append([name, entry.get("against", ""), str(entry["seeds"]), *shown, explained])
        print(f"\n{part}\n" + text_table(["cell", "against", "seeds", *SHOWN, "explained"], lines, texts=2))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser("quality.staytime_watch", __doc__)
    parser.add_argument("--work", type=local_argument, required=True, help="directory of data and finished cells")
    parser.add_argument("--users", type=int, default=250, help="users of the simulated world (default: %(default)s)")
    parser.add_argument("--kuairand", type=Path, help="imported KuaiRand; adds its parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[1:], help="(default: the last two)")
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES, metavar="BASE", help="bases to train")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of a cell (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no cell after this time (default: no limit)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the job")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    paths, words = data_paths(options)
    cells = sorted(
        (cell for cell in watch_cells(options, words) if cell.part.split()[0] in options.parts),
        key=lambda cell: cell.seed,
    )
    if not cells:
        parser.error(NO_CELLS)
    prepare(options)
    results = run_cells(cells, paths, options)
    summary = summarise_inputs(results)
    print_summary(summary)
    facts = {"question": "what duration and watch times are worth for the staytime", "users": options.users}
    facts |= {"days": DAYS, "past_visits": PAST_VISITS, "weight": WEIGHT}
    facts |= {"cells_done": len(results), "cells": len(cells)}
    facts |= {} if options.kuairand else {"kuairand": NO_KUAIRAND}
    write_result(options.out, {**facts, "result": summary})
    if options.out:
        print(json.dumps({"written": options.out.name, "cells": f"{len(results)} of {len(cells)}"}))


if __name__ == "__main__":
    main()
