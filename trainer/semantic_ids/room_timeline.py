"""Picture of one room: its codes over time, with the interactions in each segment (Foresight, Figure 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.data.format.text_schema import SEGMENT_MS
from trainer.runtime.files import whole_file
from trainer.semantic_ids.code_meaning_text import RoomRun, clock_text, code_text, room_runs, room_title

MOST_ROWS = 20
"""Most codes with a row of their own; the others share one."""

_LABEL_WIDTH = 30
_COLOURS = ("#1f6f8b", "#c8553d", "#8a6fae", "#c9a227", "#4f8a5b", "#7a5c3e")
_OTHERS = "#b0b0b0"
_SHADE = "#7f8c8d"
_MINUTE_MS = 60_000


def draw_room(document: dict[str, Any], path: Path) -> None:
    """Draw the room of an answer of ``report_meaning`` into a PNG file.

    Raises:
        UserError: the file cannot be written.
    """
    room, names = document["room"], list(document["behaviours"])
    runs = room_runs(room)
    rows = _rows(runs)
    count = len(set(rows.values())) or 1
    heights = [0.24 * count + 0.2, 0.55, *[0.42] * len(names)]
    figure = Figure(figsize=(11, sum(heights) + 1.3), layout="constrained")
    figure.suptitle(f"{room_title(document)}\ncodes of {document['version']}", fontsize=11)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_codes(panels[0], runs, rows, document)
    start_ms = np.array([segment["start_ms"] - room["start_ms"] for segment in room["segments"]])
    viewers = np.array([segment["watch_ms"] for segment in room["segments"]]) / SEGMENT_MS
    _draw_steps(panels[1], "watching", start_ms, viewers, _SHADE)
    for panel, name in zip(panels[2:], names, strict=True):
        events = np.array([segment["events"][name] for segment in room["segments"]])
        _draw_steps(panel, name, start_ms, events, _COLOURS[1])
    last = max(run.end_ms for run in runs) / _MINUTE_MS
    panels[-1].set_xlim(0, last)
    panels[-1].xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 3, 5, 6, 10]))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: clock_text(round(minutes * _MINUTE_MS))))
    panels[-1].set_xlabel("time since the start of the room", fontsize=9)
    figure.align_ylabels(panels[1:])
    with whole_file(path) as tmp_path:
        figure.savefig(tmp_path, dpi=110, format="png")


def _rows(runs: list[RoomRun]) -> dict[str, int]:
    """Return the row of each code, from the top: in the order of time, those that were on air longest.

    Codes beyond ``MOST_ROWS`` share the last row.
    """
    length: dict[str, int] = {}
    for run in runs:
        code = code_text(run.code)
        length[code] = length.get(code, 0) + run.end_ms - run.begin_ms
    kept = set(sorted(length, key=lambda code: -length[code])[: MOST_ROWS if len(length) > MOST_ROWS else None])
    own = [code for code in length if code in kept]
    return {code: own.index(code) if code in kept else len(own) for code in length}


def _draw_codes(axes: Axes, runs: list[RoomRun], rows: dict[str, int], document: dict[str, Any]) -> None:
    """Draw a bar for each run, in the row of its code."""
    labels: dict[int, str] = {}
    shared = len(rows) > MOST_ROWS
    for code, row in rows.items():
        labels[row] = f"code {code}" if code != "-" else "without a code"
    known = {code_text(code["code"]): code for code in document["codes"]}
    for code, row in rows.items():
        if code in known:
            labels[row] = _label(code, known[code])
    last = max(rows.values())
    if shared:
        labels[last] = f"{sum(row == last for row in rows.values()):,} other codes"
    bars: dict[int, list[tuple[float, float]]] = {row: [] for row in labels}
    for run in runs:
        bars[rows[code_text(run.code)]].append((run.begin_ms / _MINUTE_MS, (run.end_ms - run.begin_ms) / _MINUTE_MS))
    for row, spans in bars.items():
        grey = row == rows.get(code_text(None)) or (shared and row == last)
        # One collection a row: a bar of its own for each run would take minutes in a long room.
        axes.broken_barh(spans, (row - 0.4, 0.8), linewidth=0, color=_OTHERS if grey else _COLOURS[row % len(_COLOURS)])
    axes.set_yticks(sorted(labels), [labels[row] for row in sorted(labels)], fontsize=8)
    axes.set_ylim(last + 0.6, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(code: str, found: dict[str, Any]) -> str:
    """Return a code with its main topic, and the behaviours that it carries."""
    parts = [f"code {code}"]
    if found["topics"]:
        parts[0] += f" {next(iter(found['topics']))}"
    more = [name for name, rate in found["behaviours"].items() if rate["carries"] == "more"]
    if more:
        parts.append("+ " + ", ".join(more))
    text = " ".join(parts)
    return text if len(text) <= _LABEL_WIDTH else f"{text[: _LABEL_WIDTH - 3]}..."


def _draw_steps(axes: Axes, name: str, start_ms: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw a small panel of a value of each segment, with the largest value as its only tick."""
    end_ms = start_ms + SEGMENT_MS
    end_ms[:-1] = np.minimum(end_ms[:-1], start_ms[1:])
    edges = np.unique(np.concatenate([start_ms, end_ms]))
    heights = np.zeros(len(edges) - 1)
    # Of segments that start at once, the last one is on air; between segments nothing is.
    heights[np.searchsorted(edges, start_ms[end_ms > start_ms])] = values[end_ms > start_ms]
    axes.stairs(heights, edges / _MINUTE_MS, fill=True, color=colour)
    axes.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    highest = float(values.max(initial=0))
    axes.set_ylim(0, 1.15 * highest if highest else 1)
    axes.set_yticks([highest] if highest else [], [f"{highest:.3g}"] if highest else [], fontsize=7)
    axes.yaxis.tick_right()
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
