"""Plot of an explanation: for each history, its entries in order of time and their attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.console.text_table import age_text
from trainer.data.format.schema import DOMAINS
from trainer.ranking.history_attention import Explanation, HistoryAttention
from trainer.runtime.files import whole_file

_COLOURS = {"video": "#1f6f8b", "live": "#c8553d"}
_SHADES = ("#3c3c3c", "#8a6fae", "#c9a227")
_AGES = 6
"""Number of entries of a history whose age is written below the axis."""


def write_picture(file: Path, explanation: Explanation) -> None:
    """Write the plot as a PNG file.

    Raises:
        UserError: the file cannot be written.
    """
    histories = explanation.histories
    figure = Figure(figsize=(9, 0.9 + 1.5 * max(1, len(histories))), layout="constrained")
    figure.suptitle(
        f"user {explanation.user_id}, candidate {explanation.item_id} of author {explanation.author_id}", fontsize=11
    )
    for axes, (name, history) in zip(
        np.atleast_1d(figure.subplots(max(1, len(histories)), 1)), histories.items(), strict=False
    ):
        _draw(axes, name, history, explanation)
    with whole_file(file) as tmp_path:
        figure.savefig(tmp_path, dpi=120, format="png")


def _draw(axes: Axes, name: str, history: HistoryAttention, explanation: Explanation) -> None:
    """Draw one history.

    Each entry is a stem, the latest at the right; some have their age below. Rings mark entries of the candidate's
    author, and a row of dots marks the entries that have the candidate's value of a feature.
    """
    entries, attention = history.entries, history.attention
    place = np.arange(len(attention))
    axes.set_title(f"{name}: {len(attention)} found", loc="left", fontsize=9)
    axes.set_ylabel("attention", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for code, domain in enumerate(DOMAINS):
        own = entries.domain == code
        if own.any():
            axes.vlines(place[own], 0, attention[own], color=_COLOURS[domain], linewidth=1.5)
            axes.scatter(place[own], attention[own], s=10, color=_COLOURS[domain], label=domain)
    same = entries.author_id == explanation.author_id
    if same.any():
        label = "candidate's author"
        axes.scatter(place[same], attention[same], s=60, facecolors="none", edgecolors="black", label=label)
    ticks = np.unique(np.linspace(0, max(0, len(place) - 1), _AGES).round().astype(int))[: len(place)]
    axes.set_xticks(ticks, [age_text(explanation.at_ms - int(entries.request_ms[tick])) for tick in ticks])
    axes.tick_params(labelsize=8)
    axes.set_xlim(-1, max(1, len(place)))
    highest = max(0.01, 1.15 * float(attention.max(initial=0)))
    for row, (feature, matching) in enumerate(history.same_value.items()):
        below = np.full(int(matching.sum()), -(0.08 + 0.1 * row) * highest)
        axes.scatter(
            place[matching], below, s=6, marker="s", color=_SHADES[row % len(_SHADES)], label=f"same {feature}"
        )
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_ylim(-0.1 * (len(history.same_value) + 0.3) * highest if history.same_value else 0, highest)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= highest])
    if len(attention):
        # The legend stands beside the axes, where no stem can be hidden by it.
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
