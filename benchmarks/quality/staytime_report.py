"""Means, intervals, tables and pictures of ``benchmarks.quality.staytime``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import mean_and_half_width
from trainer.console.text_table import text_table

METRICS = ("rmse", "mae", "rmse_opened", "mae_opened", "xauc", "gauc", "ndcg@1", "ndcg@3", "ndcg@5", "mrr", "wt@3")
SHOWN = ("rmse", "mae", "mae_opened", "xauc", "gauc", "ndcg@3", "mrr")
GROUPS = ("0", "1-5", "6-50", "more")
REFERENCES = {
    "ablations": "LCU",
    "embeddings": "untuned",
    "corrections": "corrected",
    "comments": "6 comments",
    "grid": "0, 0",
}
"""Cell of a part with which the others are compared."""
PAIRS = ("bases", "backbones", "days", "training")
"""Parts in which every cell with LCU is compared with the same without."""

LABELS = {
    "rmse": "RMSE, s",
    "mae": "MAE, s",
    "mae_opened": "MAE of opened rows, s",
    "xauc": "XAUC",
    "gauc": "GAUC",
    "ndcg@3": "NDCG@3",
}
"""Metrics of the pictures, with units."""
INTERVALS = "bars: 95 % intervals over the seeds, cut where they leave the picture"

Summary = dict[str, dict[str, Any]]
"""Part -> cell -> means, half-widths and differences."""


def summarise(results: Sequence[Mapping[str, Any]]) -> Summary:
    """Return the means of every cell over its seeds, and its differences to a reference cell, seed by seed.

    Each figure is a mean and the half-width of its 95 % interval. A base with LCU is compared with the base alone,
    other cells with :data:`REFERENCES`. ``exposures`` of the bases has the same for the groups of videos; the metrics
    of constants and of the truth stand in the first cell of a part.
    """
    by_cell: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for result in results:
        by_cell.setdefault(result["part"], {}).setdefault(result["name"], {})[result["seed"]] = result["metrics"]
    summary: Summary = {}
    for part, cells in by_cell.items():
        summary[part] = {}
        for name, seeds in cells.items():
            reference = name.replace(" with LCU", " alone") if part in PAIRS else REFERENCES.get(part)
            other = cells.get(reference or "", {}) if reference != name else {}
            entry = {"seeds": len(seeds), "all": means(seeds, lambda metrics: metrics["all"])}
            if part == "bases":
                entry["exposures"] = {
                    group: means(seeds, lambda metrics, group=group: metrics["exposures"][group])  # type: ignore[misc]
                    for group in GROUPS
                }
            shared = {seed: (metrics, other[seed]) for seed, metrics in seeds.items() if seed in other}
            if shared:
                entry["against"] = reference
                entry["difference"] = differences(shared, lambda metrics: metrics["all"])
                if part == "bases":
                    entry["difference_by_exposures"] = {
                        group: differences(shared, lambda metrics, group=group: metrics["exposures"][group])  # type: ignore[misc]
                        for group in GROUPS
                    }
            first = next(iter(seeds.values()))
            if "comments" in first:
                entry["comments"] = {
                    head: mean_and_half_width([metrics["comments"][head]["auc"] for metrics in seeds.values()])
                    for head in ("popular", "touched")
                }
            if "released_definitions" in first:
                entry["released_definitions"] = {
                    metric: mean_and_half_width([one["released_definitions"][metric] for one in seeds.values()])
                    for metric in first["released_definitions"]
                }
            for extra in ("truth", "constant"):
                if extra in first and name == next(iter(cells)):
                    entry[extra] = first[extra]
            summary[part][name] = entry
    return summary


Pick = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def means(seeds: Mapping[int, Mapping[str, Any]], pick: Pick) -> dict[str, list[float | None]]:
    """Return mean and half-width of each metric over the seeds; ``pick`` finds the metrics in those of a cell."""
    return {metric: mean_and_half_width([pick(metrics)[metric] for metrics in seeds.values()]) for metric in METRICS}


def differences(
    pairs: Mapping[int, tuple[Mapping[str, Any], Mapping[str, Any]]], pick: Pick
) -> dict[str, list[float | None]]:
    """Return mean and half-width of the difference of each metric over pairs of cells by seed, first less second."""
    return {
        metric: mean_and_half_width(
            [
                None
                if pick(one)[metric] is None or pick(other)[metric] is None
                else pick(one)[metric] - pick(other)[metric]
                for one, other in pairs.values()
            ]
        )
        for metric in METRICS
    }


def print_tables(summary: Summary) -> None:
    """Print every part as a table of means, with the differences under the cells that have some."""
    for part, cells in summary.items():
        lines = []
        for name, cell in cells.items():
            lines.append([name, str(cell["seeds"]), *(_cell(cell["all"][metric]) for metric in SHOWN)])
            if "difference" in cell:
                differences = (_cell(cell["difference"][metric], sign=True) for metric in SHOWN)
                lines.append([f"  against {cell['against']}", "", *differences])
        print(f"\n{part}\n" + text_table([part, "seeds", *SHOWN], lines))
    if "bases" in summary:
        lines = [
            [name, group, *(_cell(cell["difference_by_exposures"][group][metric], sign=True) for metric in SHOWN)]
            for name, cell in summary["bases"].items()
            if "difference_by_exposures" in cell
            for group in GROUPS
        ]
        print("\nLCU less the base alone, by exposures of the video in training")
        print(text_table(["base", "exposures", *SHOWN], lines, texts=2))


def _cell(value: Sequence[float | None], *, sign: bool = False) -> str:
    mean, spread = value
    if mean is None:
        return "-"
    text = f"{mean:+.4f}" if sign else f"{mean:.4f}"
    return text if spread is None else f"{text} ±{spread:.4f}"


def write_pictures(summary: Summary, out: Path) -> None:
    """Write ``OUT_bases.svg``, ``OUT_cold.svg`` and ``OUT_grid.svg``, each if its cells have been run."""
    if any("difference" in cell for cell in summary.get("bases", {}).values()):
        _differences_picture(summary["bases"], out.with_name(f"{out.stem}_bases.svg"))
        _cold_picture(summary["bases"], out.with_name(f"{out.stem}_cold.svg"))
    if "grid" in summary:
        _grid_picture(summary["grid"], out.with_name(f"{out.stem}_grid.svg"))


def _differences_picture(bases: Mapping[str, Any], file: Path) -> None:
    """Draw the gain of LCU over each base, with intervals."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    pairs = {name.removesuffix(" with LCU"): cell["difference"] for name, cell in bases.items() if "difference" in cell}
    panels = figure.subplots(1, len(LABELS), sharey=True)
    for axes, (metric, label) in zip(panels, LABELS.items(), strict=True):
        for place, difference in enumerate(pairs.values()):
            mean, spread = difference[metric]
            axes.errorbar(mean, place, xerr=spread or 0, fmt="o", color="#1f6f8b", capsize=3)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel=label, xlim=_limits([difference[metric] for difference in pairs.values()]))
        axes.locator_params(axis="x", nbins=4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(pairs)), list(pairs))
    panels[0].invert_yaxis()
    figure.suptitle(f"with LCU less the base alone; {INTERVALS}", fontsize=10)
    figure.savefig(file, metadata={"Date": None})


def _limits(intervals: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Return limits around zero that show most of the intervals, so that a wide one does not flatten the others."""
    ends = [abs(mean) + (spread or 0.0) for mean, spread in intervals if mean is not None]
    end = min(2.5 * float(np.median(ends)), 1.1 * max(ends)) if ends else 1.0
    return -end, end


def _cold_picture(bases: Mapping[str, Any], file: Path) -> None:
    """Draw the gain of LCU by exposures of the video in training."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    cells = {name.split()[0]: cell["difference_by_exposures"] for name, cell in bases.items() if "difference" in cell}
    panels = figure.subplots(1, 3)
    for axes, metric in zip(panels, ("rmse", "xauc", "gauc"), strict=True):
        for number, (name, groups) in enumerate(cells.items()):
            # Bases stand side by side, so that their intervals do not overlap.
            place = np.arange(len(GROUPS)) + (number - (len(cells) - 1) / 2) * 0.12
            mean, spread = np.array([groups[group][metric] for group in GROUPS], float).T
            axes.errorbar(place, mean, yerr=np.nan_to_num(spread), fmt="o", markersize=4, capsize=2, label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(GROUPS)), GROUPS)
        limits = _limits([cell[group][metric] for cell in cells.values() for group in GROUPS])
        axes.set(xlabel="exposures of the video in training", ylabel=LABELS[metric], ylim=limits)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, title="base")
    figure.suptitle(f"with LCU less the base alone; {INTERVALS}", fontsize=10)
    figure.savefig(file, metadata={"Date": None})


def _grid_picture(grid: Mapping[str, Any], file: Path) -> None:
    """Draw RMSE against GAUC of every pair of weights; a line joins the pairs that no other beats in both."""
    weights = [tuple(name.split(", ")) for name in grid]
    points = np.array([[cell["all"]["rmse"][0], cell["all"]["gauc"][0]] for cell in grid.values()])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    best = pareto(points)
    axes.plot(points[best, 0], points[best, 1], color="grey", linewidth=1, zorder=0, label="no pair is better in both")
    # Colours and shapes instead of names, since sixteen names would overlap.
    firsts, seconds = (list(dict.fromkeys(pair[side] for pair in weights)) for side in (0, 1))
    for (first, second), (x, y) in zip(weights, points, strict=True):
        color, marker = f"C{firsts.index(first)}", "osD^v<>P*X"[seconds.index(second)]
        axes.plot(x, y, linestyle="", color=color, marker=marker, markersize=7)
    for number, first in enumerate(firsts):
        axes.plot([], [], linestyle="", marker="s", color=f"C{number}", label=f"lambda1 = {first}")
    for number, second in enumerate(seconds):
        marker = "osD^v<>P*X"[number]
        axes.plot(
            [], [], linestyle="", marker=marker, color="white", markeredgecolor="black", label=f"lambda2 = {second}"
        )
    seeds = min(cell["seeds"] for cell in grid.values())
    axes.set(xlabel="RMSE, s (less is better)", ylabel="GAUC (more is better)", title=f"means over the seeds ({seeds})")
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def pareto(points: np.ndarray) -> np.ndarray:
    """Return the rows of ``[n, 2]`` that no other row beats: lower in the first column, higher in the second."""
    kept = [
        row for row, (x, y) in enumerate(points) if not any((a <= x and b >= y) and (a < x or b > y) for a, b in points)
    ]
    return np.array(sorted(kept, key=lambda row: points[row, 0]))
