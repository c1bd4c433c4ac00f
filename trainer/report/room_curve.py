"""One room over time: predicted, true and observed probabilities of its held-out visits."""

from __future__ import annotations

import numpy as np

from trainer.report.charts import Series, line_chart
from trainer.report.held_out import HeldOutRows
from trainer.report.page_parts import ReportSection, drawn

LEAST_ROWS = 20
"""Fewest held-out visits of a point of the curve."""

MOST_POINTS = 24

LEAST_POINTS = 4
"""Points below which there is no curve."""

_MINUTE_MS = 60_000


def room_section(held_out: HeldOutRows | None) -> ReportSection:
    """Return the curve of the room or video with the most held-out visits; empty if none has enough of them."""
    title = "One room over time"
    if held_out is None or "item_id" not in held_out.ids or not len(held_out.visit_id):
        return ReportSection(title)
    items, counts = np.unique(held_out.ids["item_id"][held_out.ids["item_id"] >= 0], return_counts=True)
    positives = (held_out.label * (held_out.mask > 0)).sum(0)
    k = int(positives.argmax())
    if not len(items):
        return ReportSection(title)
    item = int(items[counts.argmax()])
    rows = np.flatnonzero((held_out.ids["item_id"] == item) & (held_out.mask[:, k] > 0))
    rows = rows[np.argsort(held_out.request_ms[rows], kind="stable")]
    points = min(MOST_POINTS, len(rows) // LEAST_ROWS)
    if points < LEAST_POINTS:
        return ReportSection(title)
    groups = np.array_split(rows, points)
    began = held_out.request_ms[rows[0]]
    minutes = [float((held_out.request_ms[group] - began).mean() / _MINUTE_MS) for group in groups]
    values = {"predicted": held_out.probability[:, k], "observed": held_out.label[:, k].astype(np.float32)}
    if held_out.truth is not None:
        values["true"] = held_out.truth[:, k]
    behaviour = held_out.behaviours[k]
    chart = line_chart(
        f"Probability of {behaviour} in item {item}",
        "minutes since its first held-out visit",
        "mean probability",
        [
            Series.of(name, minutes, [float(of_row[group].mean()) for group in groups])
            for name, of_row in values.items()
        ],
        zero=True,
    )
    text = (
        f"The item with the most held-out visits ({len(rows):,}), in {points} groups of equally many visits. The "
        "observed share of a small group is noisy."
    )
    if held_out.truth is not None:
        text += " The true probabilities are known in this simulated world."
    return ReportSection(title, text, [], drawn(chart))
