"""Tables and picture of ``benchmarks/quality/alignment.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quality.larm_report import cell
from benchmarks.quality.recipe_report import tables as recipe_tables
from trainer.console.text_table import text_table

NONE, ALIGNED, NO_VIDEOS = "no alignment", "alignment", "no videos"
ALL, FEW, MANY = "all", "few live visits", "many live visits"
GROUPS = (ALL, FEW, MANY)
METRICS = ("auc", "gauc")


def tables(result: Mapping[str, Any]) -> str:
    """Return all tables as text: the tuning days, then for each variant its differences by world and group."""
    blocks = [f"tuning days\n\n{recipe_tables(result['tuning'])}"] if "tuning" in result else []
    for variant in (ALIGNED, NO_VIDEOS):
        for metric in METRICS:
            lines = []
            for world, of_world in result["worlds"].items():
                for group, found in of_world["groups"].items():
                    behaviours = found["behaviours"]
                    if variant in found["recipes"]:
                        cells = [cell(of["recipes"][variant][f"{metric}_difference"]) for of in behaviours.values()]
                        lines.append([f"{world} ({of_world['correlation']:.2f})", group, *cells])
            if lines:
                names = next(iter(result["worlds"].values()))["groups"][ALL]["behaviours"]
                header = ["correlation", "users", *names]
                blocks.append(f"{variant} less {NONE}, {metric.upper()}, points\n\n{text_table(header, lines)}")
    return "\n\n".join(blocks)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw what the loss and what videos add to click AUC, against the correlation, for each group of users."""
    worlds = sorted(result["worlds"].values(), key=lambda world: world["correlation"])
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, variant, sign, title in zip(
        panels, (ALIGNED, NO_VIDEOS), (1, -1), ("the loss adds", "videos in histories add"), strict=True
    ):
        for number, group in enumerate(GROUPS):
            points = []
            for world in worlds:
                click = next(iter(world["groups"][group]["behaviours"].values()))
                found = click["recipes"].get(variant, {}).get("auc_difference")
                if found and found["low"] is not None:
                    ends = sorted((sign * found["low"], sign * found["high"]))
                    # Side by side, so that no interval hides another one.
                    points.append((world["correlation"] + 0.012 * (number - 1), sign * found["mean"], *ends))
            if points:
                x, mean, low, high = zip(*points, strict=True)
                errors = [
                    [max(0.0, m - end) for m, end in zip(mean, low, strict=True)],
                    [max(0.0, end - m) for m, end in zip(mean, high, strict=True)],
                ]
                panel.errorbar(x, mean, errors, marker="o", markersize=4, linewidth=1, capsize=2, label=group)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"what {title}, click AUC in points")
        panel.set_xlabel("correlation of interests in videos and rooms")
        panel.legend(fontsize="small")
    figure.savefig(file, dpi=110)
