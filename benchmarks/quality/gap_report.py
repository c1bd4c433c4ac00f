"""Tables and picture of ``benchmarks/quality/gap.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.attainable_bound import ATTAINABLE
from trainer.console.text_table import text_table

METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss"}
BEST = "best possible"
COLUMNS = 4
"""Panels of the picture in a line."""


def waterfall(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the lines of a behaviour from the run to the best possible, with their names."""
    lines = [("run", found["run"]), ("calibrated", found["calibrated"])]
    lines += [(f"+ {step['factor']}", step) for step in found["steps"]]
    if found["others"]:
        lines.append(("+ all others", found["all"]))
    return [*lines, (BEST, found["bounds"][BEST])]


def tables(result: Mapping[str, Any]) -> str:
    """Return all tables as text."""
    blocks = []
    for behaviour, found in result["behaviours"].items():
        title = f"{behaviour}, {found['positives']:,} of {found['rows']:,}"
        lines = [[name, *_values(line)] for name, line in waterfall(found)]
        if ATTAINABLE in found["bounds"]:
            lines.append([f"({ATTAINABLE})", *_values(found["bounds"][ATTAINABLE])])
        blocks.append(text_table([title, *METRICS.values()], lines))
        if ATTAINABLE in found["bounds"]:
            verdict = "; the bound is too low" if found["above_attainable"] else ""
            blocks.append(
                f"{behaviour}: {_gain(found['room'])} points of AUC from the run to the attainable bound{verdict}"
            )
        guessed = "estimates_gain" in found
        header = ["told alone", "AUC, points", *(["its estimate"] if guessed else []), *METRICS.values()]
        lines = [
            [
                name,
                _gain(line["auc_gain"]),
                *([_gain(line["estimate_gain"]) if "estimate_gain" in line else "-"] if guessed else []),
                *_values(line),
            ]
            for name, line in found["alone"].items()
        ]
        blocks.append(text_table(header, lines))
        if guessed:
            gain = _gain(found["estimates_gain"])
            blocks.append(f"{behaviour}: {gain} points of AUC from the estimates of all factors at once")
    blocks += [f"{behaviour}: left out, {reason}" for behaviour, reason in result["left_out"].items()]
    return "\n\n".join(blocks)


def _values(line: Mapping[str, Sequence[float | None]]) -> list[str]:
    cells = []
    for metric in METRICS:
        mean, half = line[metric]
        cells.append("-" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ±{half:.4f}"))
    return cells


def _gain(gain: Mapping[str, float | None]) -> str:
    if gain["mean"] is None:
        return "-"
    return f"{gain['mean']:+.2f}" + ("" if gain["low"] is None else f" [{gain['low']:+.2f}, {gain['high']:+.2f}]")


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw a panel for each behaviour: bars from the AUC of one line of the waterfall to that of the next."""
    behaviours = result["behaviours"]
    rows = -(-len(behaviours) // COLUMNS)
    most = max(len(waterfall(found)) for found in behaviours.values())
    figure = Figure(figsize=(4 * min(len(behaviours), COLUMNS), rows * (1.2 + 0.24 * most)), layout="constrained")
    panels = figure.subplots(rows, min(len(behaviours), COLUMNS), squeeze=False).flatten()
    for panel, (behaviour, found) in zip(panels, behaviours.items(), strict=False):
        _draw_waterfall(panel, behaviour, found)
    for panel in panels[len(behaviours) :]:
        panel.set_axis_off()
    figure.suptitle("AUC if the run's log-odds are told one factor after the other")
    figure.savefig(file, dpi=110)


def _draw_waterfall(panel: Axes, behaviour: str, found: Mapping[str, Any]) -> None:
    lines = waterfall(found)
    values = [line["auc"][0] for _, line in lines]
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or 0.01
    for place, value in enumerate(values):
        whole = place in (0, len(values) - 1)
        begin = low - room if whole else values[place - 1]
        # The first and the last bar are values, those between them are differences.
        colour = "tab:grey" if whole else "tab:blue" if value >= begin else "tab:red"
        panel.barh(place, value - begin, left=begin, color=colour, height=0.7)
        panel.text(max(value, begin) + 0.02 * (high - low), place, f"{value:.4f}", va="center", fontsize="x-small")
    if ATTAINABLE in found["bounds"]:
        attainable = found["bounds"][ATTAINABLE]["auc"][0]
        panel.axvline(attainable, color="black", linestyle="--", linewidth=1)
        panel.text(attainable, -0.9, f"{ATTAINABLE} {attainable:.4f}", ha="center", fontsize="x-small")
    panel.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize="x-small")
    panel.set_ylim(len(lines) - 0.4, -1.3)
    panel.set_xlim(low - room, high + 1.2 * room)
    panel.tick_params(axis="x", labelsize="x-small")
    panel.set_title(f"{behaviour} ({found['positives']:,} positives)", fontsize="small")
