"""Tables and picture of ``benchmarks/quality/cross.py``: the paper's Tables 2 and 4, from the figures of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import mean_and_half_width
from trainer.console.text_table import text_table

FULL, NO_VIDEOS, WITHOUT_CROSS = "full", "no short videos", "CGC without Cross"
GROUPS = ("low", "middle", "high", "full")
"""Quarters of the users by activity, in the order of the world's ``activity_band``."""

Figures = dict[str, dict[str, dict[str, float | int | None]]]
"""Group of users (``all`` too) -> behaviour -> metric -> value, None where it is undefined."""


@dataclass(frozen=True)
class VariantResult:
    """Figures of one variant with one seed; ``seconds`` are processor time."""

    variant: str
    seed: int
    seconds: float
    groups: Figures

    def points(self, group: str, behaviour: str, metric: str) -> float:
        """Return a figure in points, nan where it is undefined."""
        value = self.groups[group][behaviour][metric]
        return float("nan") if value is None else 100 * value


def summarise(runs: list[VariantResult], variants: list[str]) -> dict[str, Any]:
    """Return Table 2 by behaviour and variant and Table 4 by behaviour and group, in points.

    Every variant is compared with the full model of the same seed.

    Args:
        runs: in any order.
        variants: in the order of the table, the full model first.
    """
    found = {(run.variant, run.seed): run for run in runs}
    seeds = [run.seed for run in runs if run.variant == FULL]
    first = found[FULL, seeds[0]].groups["all"]

    def difference(variant: str, group: str, behaviour: str, metric: str) -> dict[str, float | int | None]:
        pairs = [(found[variant, seed], found[FULL, seed]) for seed in seeds if (variant, seed) in found]
        return with_interval(
            [one.points(group, behaviour, metric) - full.points(group, behaviour, metric) for one, full in pairs]
        )

    return {
        "table_2": {
            behaviour: {
                "positives": facts["positives"],
                "rows": facts["rows"],
                "best_auc": 100 * (facts["best_auc"] or 0),
                "best_gauc": 100 * (facts["best_gauc"] or 0),
                FULL: {
                    metric: with_interval([found[FULL, seed].points("all", behaviour, metric) for seed in seeds])
                    for metric in ("auc", "gauc")
                },
                "difference": {
                    variant: {metric: difference(variant, "all", behaviour, metric) for metric in ("auc", "gauc")}
                    for variant in variants
                    if variant != FULL
                },
            }
            for behaviour, facts in first.items()
        },
        "table_4": {
            behaviour: {group: difference(NO_VIDEOS, group, behaviour, "auc") for group in GROUPS}
            for behaviour in first
        },
    }


def with_interval(values: list[float]) -> dict[str, float | int | None]:
    """Return the mean over seeds and the half-width of its 95 % interval, None where there are too few values."""
    defined = [value for value in values if np.isfinite(value)]
    mean, half = mean_and_half_width(defined)
    return {"mean": mean, "half_width_95": half, "seeds": len(defined)}


def cell(figure: dict[str, Any], sign: str = "+") -> str:
    """Return a mean and its interval as text."""
    if figure["mean"] is None:
        return "-"
    spread = "" if figure["half_width_95"] is None else f" ±{figure['half_width_95']:.2f}"
    return f"{figure['mean']:{sign}.2f}{spread}"


def tables(result: dict[str, Any]) -> str:
    """Return both tables as text."""
    table_2, table_4 = result["table_2"], result["table_4"]
    behaviours = list(table_2)
    blocks = []
    for metric, name in (("auc", "AUC"), ("gauc", "GAUC")):
        lines = [["best possible", *(f"{table_2[behaviour][f'best_{metric}']:.2f}" for behaviour in behaviours)]]
        lines.append([FULL, *(cell(table_2[behaviour][FULL][metric], "") for behaviour in behaviours)])
        for variant in table_2[behaviours[0]]["difference"]:
            figures = (table_2[behaviour]["difference"][variant][metric] for behaviour in behaviours)
            lines.append([variant, *map(cell, figures)])
        blocks.append(text_table([f"{name}, points", *behaviours], lines))
    lines = [[group, *(cell(table_4[behaviour][group]) for behaviour in behaviours)] for group in GROUPS]
    blocks.append(text_table([f"AUC, {NO_VIDEOS}, by activity", *behaviours], lines))
    return "\n\n".join(blocks)


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the differences in AUC of both tables.

    A column for each behaviour has a bar for each variant above and for each group of users below, with intervals.
    ``WITHOUT_CROSS`` stands in the title only: its bar would hide the others.
    """
    table_2, table_4 = result["table_2"], result["table_4"]
    figure = Figure(figsize=(2 * len(table_2) + 1.4, 5.6), layout="constrained")
    panels = figure.subplots(2, len(table_2), sharey="row", sharex="row", height_ratios=(2, 1), squeeze=False)
    for (upper, lower), (behaviour, found) in zip(panels.T, table_2.items(), strict=True):
        shown = {name: of["auc"] for name, of in found["difference"].items() if name != WITHOUT_CROSS}
        _bars(upper, shown, "#1f6f8b")
        title = [f"{FULL} {found[FULL]['auc']['mean']:.1f}, best possible {found['best_auc']:.1f}"]
        without = found["difference"].get(WITHOUT_CROSS)
        if without is not None and without["auc"]["mean"] is not None:
            title.append(f"{WITHOUT_CROSS} {without['auc']['mean']:+.1f}")
        upper.set_title("\n".join([behaviour, *title]), fontsize=8)
        _bars(lower, table_4[behaviour], "#c8553d")
    panels[0, 0].invert_yaxis()
    panels[1, 0].invert_yaxis()
    panels[1, 0].set_ylabel(f"{NO_VIDEOS},\nusers by activity", fontsize=8)
    figure.supxlabel("difference in AUC to the full model, points; 95 % intervals over the seeds", fontsize=9)
    figure.savefig(file, dpi=110)


def _bars(panel: Axes, figures: dict[str, dict[str, Any]], colour: str) -> None:
    means = [figure["mean"] or 0.0 for figure in figures.values()]
    spread = [figure["half_width_95"] or 0.0 for figure in figures.values()]
    panel.barh(list(figures), means, xerr=spread, color=colour, error_kw={"linewidth": 1})
    panel.axvline(0, color="black", linewidth=0.8)
    panel.grid(axis="x", linewidth=0.3)
    panel.tick_params(labelsize=8)
