"""Tables of ``benchmarks/quality/recipe.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from benchmarks.measure import mean_and_half_width
from benchmarks.quality.attainable_bound import ATTAINABLE, exceeds, room_below
from benchmarks.quality.kept_runs import KeptRun
from benchmarks.quality.larm_report import cell
from benchmarks.quality.paired_users import UserMetric, on_all_users, paired_difference
from trainer.console.text_table import text_table

BEST = "best possible"
METRICS: tuple[Literal["auc", "gauc"], ...] = ("auc", "gauc")


def summarise(
    runs: Mapping[str, Mapping[int, KeptRun]],
    than: Mapping[str, str],
    default: str,
    floor: str | None,
    bounds: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the speed of each recipe, and by behaviour its metrics, differences and share of the gap.

    Args:
        runs: recipe -> seed -> run; all of the same rows.
        than: recipe -> recipe that it is compared with; where that one has no run, ``default`` takes its place.
        default: recipe that has a run.
        floor: recipe at the lower end of the gap; None without one.
        bounds: attainable and best probabilities of the rows, in the order of the default's first run; empty without.
    """
    first = next(iter(runs[default].values())).scores
    for run in (run for of_recipe in runs.values() for run in of_recipe.values()):
        assert np.array_equal(run.scores.visit_id, first.visit_id), "all have equal rows"
    recipes = {
        name: {
            "to": (than[name] if than[name] in runs else default) if name != default else "",
            "seeds": sorted(of_recipe),
            "rows": next(iter(of_recipe.values())).rows,
            "rows_per_second": mean_and_half_width([run.rows / run.seconds for run in of_recipe.values()]),
        }
        for name, of_recipe in runs.items()
    }
    behaviours = {
        behaviour: _of_behaviour(k, runs, {name: str(found["to"]) for name, found in recipes.items()}, floor, bounds)
        for k, behaviour in enumerate(first.behaviours)
    }
    return {"recipes": recipes, "behaviours": behaviours}


def _of_behaviour(
    k: int,
    runs: Mapping[str, Mapping[int, KeptRun]],
    to: Mapping[str, str],
    floor: str | None,
    bounds: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return all figures of a behaviour; ``to`` has the recipe that each one is compared with."""
    first = next(iter(next(iter(runs.values())).values())).scores
    rows = first.mask[:, k] > 0
    label = first.label[rows, k]
    users, user = np.unique(first.user_id[rows], return_inverse=True)
    of_recipe = {
        name: {seed: UserMetric(user, run.scores.probability[rows, k], label) for seed, run in seeds.items()}
        for name, seeds in runs.items()
    }
    found: dict[str, Any] = {"rows": int(rows.sum()), "positives": int(label.sum()), "recipes": {}, "bounds": {}}
    for name, seeds in of_recipe.items():
        line: dict[str, Any] = {}
        both = [seed for seed in seeds if to[name] and seed in of_recipe[to[name]]]
        for metric in METRICS:
            line[metric] = mean_and_half_width(
                [on_all_users(getattr(one, metric), len(users)) for one in seeds.values()]
            )
            pairs = [[getattr(of_recipe[other][seed], metric) for seed in both] for other in (to[name] or name, name)]
            line[f"{metric}_difference"] = asdict(paired_difference(pairs[0], pairs[1], len(users)))
        found["recipes"][name] = line
    if floor is not None:
        bound = {name: UserMetric(user, values[rows, k], label) for name, values in bounds.items()}
        found["bounds"] = {
            name: {metric: on_all_users(getattr(one, metric), len(users)) for metric in METRICS}
            for name, one in bound.items()
        }
        low, high = found["recipes"][floor]["auc"][0], found["bounds"][ATTAINABLE]["auc"]
        for name, seeds in of_recipe.items():
            values = [on_all_users(one.auc, len(users)) for one in seeds.values()]
            found["recipes"][name]["gap_closed"] = mean_and_half_width([(one - low) / (high - low) for one in values])
        found["above_attainable"] = [
            name
            for name, seeds in runs.items()
            if exceeds(
                room_below(
                    bounds[ATTAINABLE][rows, k],
                    [run.scores.probability[rows, k] for run in seeds.values()],
                    label,
                    first.user_id[rows],
                )
            )
        ]
    return found


def tables(result: Mapping[str, Any]) -> str:
    """Return all tables as text."""
    blocks = []
    for behaviour, found in result["behaviours"].items():
        lines = []
        for name, line in found["recipes"].items():
            share = line.get("gap_closed", [None, None])[0]
            lines.append(
                [
                    name,
                    *(
                        text
                        for metric in METRICS
                        for text in (_value(line[metric]), cell(line[f"{metric}_difference"]))
                    ),
                    "" if share is None else f"{round(100 * share)} %",
                ]
            )
        lines += [[name, f"{of['auc']:.4f}", "", f"{of['gauc']:.4f}", "", ""] for name, of in found["bounds"].items()]
        header = [f"{behaviour}, {found['positives']:,} of {found['rows']:,}", "AUC", "points", "GAUC", "points"]
        blocks.append(text_table([*header, "of the gap"], lines))
        if above := found.get("above_attainable"):
            blocks.append(f"{behaviour}: above the attainable bound, which is too low: {', '.join(above)}")
    lines = [
        [name, found["to"], str(len(found["seeds"])), f"{found['rows_per_second'][0]:,.0f}"]
        for name, found in result["recipes"].items()
    ]
    blocks.append(text_table(["recipe", "compared with", "seeds", "rows a second and core"], lines))
    return "\n\n".join(blocks)


def _value(found: Sequence[float | None]) -> str:
    mean, half = found
    return "-" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ±{half:.4f}")
