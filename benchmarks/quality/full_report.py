"""Systems, tables and picture of ``benchmarks/quality/full.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import mean_and_half_width
from benchmarks.quality.attainable_bound import ATTAINABLE, exceeds, room_below
from benchmarks.quality.larm_report import Scores, cell
from benchmarks.quality.paired_users import UserMetric, on_all_users, paired_difference
from trainer.console.text_table import text_table

LOGISTIC, BASE = "logistic regression", "PLE"
CROSS, VECTORS, LARM, FORESIGHT, MOMENT = "+ Cross", "+ vectors", "+ LARM", "+ Foresight", "+ Moment"
SYSTEMS = (LOGISTIC, BASE, CROSS, VECTORS, LARM, FORESIGHT, MOMENT)
"""Lines of the table; each one from ``CROSS`` on adds a system to the line before it."""

BEST = "best possible"
METRICS: tuple[Literal["auc", "gauc"], ...] = ("auc", "gauc")


@dataclass(frozen=True)
class SystemRun:
    """A system's ranker of one seed.

    Attributes:
        scores: predictions of the held-out rows.
        rows, seconds: of the training on stored rows; processor seconds.
        stream_rows, stream_seconds: of the stream of the held-out day, 0 without one.
    """

    scores: Scores
    rows: int
    seconds: float
    stream_rows: int
    stream_seconds: float


@dataclass(frozen=True)
class Bounds:
    """Probabilities of the held-out rows, ``[n, behaviours]`` each.

    Attributes:
        truth: that nobody can know.
        hidden: what is hidden -> the truth with this replaced by its expectation; ``ATTAINABLE`` hides all of it.
    """

    truth: np.ndarray
    hidden: Mapping[str, np.ndarray]


def summarise(seeds: Sequence[Mapping[str, SystemRun]], bounds: Bounds) -> dict[str, Any]:
    """Return the speed of each system, and by behaviour the metrics of the systems and of the bounds.

    Args:
        seeds: system -> its run, one mapping for each seed.
        bounds: of the rows that all runs predict.
    """
    first = seeds[0][LOGISTIC].scores
    for runs in seeds:
        assert all(np.array_equal(run.scores.visit_id, first.visit_id) for run in runs.values()), "all have equal rows"
    _, user = np.unique(first.user_id, return_inverse=True)
    speed = {
        name: {
            "rows": seeds[0][name].rows,
            "rows_per_second": mean_and_half_width([runs[name].rows / runs[name].seconds for runs in seeds]),
            "stream_rows_per_second": mean_and_half_width(
                [runs[name].stream_rows / runs[name].stream_seconds for runs in seeds if runs[name].stream_seconds]
            ),
        }
        for name in seeds[0]
    }
    behaviours = {behaviour: _of_behaviour(k, user, seeds, bounds) for k, behaviour in enumerate(first.behaviours)}
    return {"speed": speed, "behaviours": behaviours}


def _of_behaviour(k: int, user: np.ndarray, seeds: Sequence[Mapping[str, SystemRun]], bounds: Bounds) -> dict[str, Any]:
    first = seeds[0][LOGISTIC].scores
    rows = first.mask[:, k] > 0
    users = int(user.max()) + 1

    def measured(probability: np.ndarray) -> UserMetric:
        return UserMetric(user[rows], probability[rows, k], first.label[rows, k])

    of_system = {name: [measured(runs[name].scores.probability) for runs in seeds] for name in seeds[0]}
    of_bound = {BEST: measured(bounds.truth), **{name: measured(values) for name, values in bounds.hidden.items()}}
    found: dict[str, Any] = {"rows": int(rows.sum()), "positives": int(first.label[rows, k].sum())}
    for metric in METRICS:
        values = {name: [getattr(one, metric) for one in ones] for name, ones in of_system.items()}
        on_all = {name: [on_all_users(value, users) for value in ones] for name, ones in values.items()}
        bound = {name: on_all_users(getattr(one, metric), users) for name, one in of_bound.items()}
        floor, best = float(np.mean(on_all[LOGISTIC])), bound[BEST]
        names = list(values)
        found[metric] = {
            "bounds": bound,
            "attainable_share": (bound[ATTAINABLE] - floor) / (best - floor),
            "systems": {
                name: {
                    "value": mean_and_half_width(on_all[name]),
                    "gap_closed": mean_and_half_width([(one - floor) / (best - floor) for one in on_all[name]]),
                    "to_attainable": (float(np.mean(on_all[name])) - floor) / (bound[ATTAINABLE] - floor),
                }
                for name in names
            },
            "differences": [
                {"system": name, "to": to, **asdict(paired_difference(values[to], values[name], users))}
                for to, name in [*pairwise(names), (BASE, FORESIGHT), (BASE, MOMENT)]
            ],
        }
    bound = bounds.hidden[ATTAINABLE][rows, k]
    rooms = {
        name: room_below(
            bound, [runs[name].scores.probability[rows, k] for runs in seeds], first.label[rows, k], user[rows]
        )
        for name in seeds[0]
    }
    found["above_attainable"] = [name for name, room in rooms.items() if exceeds(room)]
    found["calibration"] = {
        name: float(np.mean([runs[name].scores.probability[rows, k].mean() for runs in seeds]))
        / float(first.label[rows, k].mean())
        if first.label[rows, k].any()
        else None
        for name in seeds[0]
    }
    return found


def tables(result: Mapping[str, Any]) -> str:
    """Return all tables as text."""
    blocks = []
    for behaviour, found in result["behaviours"].items():
        lines = []
        for name in result["speed"]:
            auc, gauc = (found[metric]["systems"][name] for metric in METRICS)
            steps = [
                next((cell(one) for one in found[metric]["differences"] if one["system"] == name), "")
                for metric in METRICS
            ]
            lines.append(
                [name, _value(auc["value"]), steps[0], _share(auc["gap_closed"]), _value(gauc["value"]), steps[1]]
            )
        for name, value in found["auc"]["bounds"].items():
            lines.append([name, f"{value:.4f}", "", "", f"{found['gauc']['bounds'][name]:.4f}", ""])
        header = [f"{behaviour}, {found['positives']:,} of {found['rows']:,}", "AUC", "to the line above, points"]
        blocks.append(text_table([*header, "of the gap", "GAUC", "to the line above, points"], lines))
        if above := found["above_attainable"]:
            blocks.append(f"{behaviour}: above the attainable bound, which is too low: {', '.join(above)}")
    lines = [
        [name, _rate(found["rows_per_second"]), _rate(found["stream_rows_per_second"])]
        for name, found in result["speed"].items()
    ]
    blocks.append(text_table(["rows a second and core", "stored rows", "stream"], lines))
    return "\n\n".join(blocks)


def _value(found: Sequence[float | None]) -> str:
    mean, half = found
    return "-" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ±{half:.4f}")


def _share(found: Sequence[float | None]) -> str:
    mean, half = found
    # Rounded to a whole number, since a mean of -1e-17 would read -0.
    return "-" if mean is None else f"{round(100 * mean)} %" + ("" if half is None else f" ±{100 * half:.0f}")


def _rate(found: Sequence[float | None]) -> str:
    return "-" if found[0] is None else f"{found[0]:,.0f}"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw the share of the gap in click AUC, a bar for each system, with both bounds as lines."""
    behaviour, found = next(iter(result["behaviours"].items()))
    auc = found["auc"]
    names = [name for name in auc["systems"] if name != LOGISTIC]
    shares = [auc["systems"][name]["gap_closed"] for name in names]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    bars = panel.bar(
        range(len(names)),
        [100 * mean for mean, _ in shares],
        0.6,
        # One seed has no interval.
        yerr=None if shares[0][1] is None else [100 * half for _, half in shares],
        capsize=3,
        color="tab:blue",
    )
    panel.bar_label(bars, [f"{auc['systems'][name]['value'][0]:.4f}" for name in names], padding=3, fontsize="small")
    for name, share, style in ((BEST, 1.0, "-"), (ATTAINABLE, auc["attainable_share"], "--")):
        panel.axhline(100 * share, color="black", linestyle=style, linewidth=1)
        label = f"{name}: {auc['bounds'][name]:.4f}"
        panel.text(len(names) - 0.5, 100 * share - 1, label, ha="right", va="top", fontsize="small")
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("share of the gap, %")
    floor = auc["systems"][LOGISTIC]["value"][0]
    panel.set_title(f"AUC of {behaviour}: 0 % is logistic regression ({floor:.4f}), 100 % the true probability")
    figure.savefig(file, dpi=110)
