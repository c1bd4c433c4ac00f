"""The metrics table of a run, and its report: a self-contained ``report.html`` with pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.console.text_table import text_table
from trainer.runtime.phase_timer import PHASES

COLUMNS = ("auc", "gauc", "uauc", "logloss", "ne", "calibration", "positives", "rows")
"""Metrics of the table, in order; ``best_auc`` follows if the true probabilities are known."""


Metrics = Mapping[str, Mapping[str, float | int | None]]
"""Behaviour -> metric -> value, ``None`` if undefined."""


def metrics_table(models: Mapping[str, Metrics]) -> str:
    """Format the metrics of one model or several: a line per behaviour and model, ``-`` if undefined."""
    behaviours = list(next(iter(models.values())))
    columns = [*COLUMNS]
    if any("best_auc" in metrics[behaviour] for metrics in models.values() for behaviour in metrics):
        columns += ["best_auc"]
    header = ["behaviour", *(["model"] if len(models) > 1 else []), *columns]
    lines = []
    for behaviour in behaviours:
        for name, metrics in models.items():
            values = metrics[behaviour]
            label = [behaviour, name] if len(models) > 1 else [behaviour]
            lines.append([*label, *(_cell(values.get(column)) for column in columns)])
    return text_table(header, lines, texts=2 if len(models) > 1 else 1)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def write_report(
    path: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    models: Mapping[str, Metrics],
    history: Sequence[Mapping[str, Any]],
    plan: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Sequence[tuple[float, float, int]]],
) -> None:
    """Write ``report.html``.

    Args:
        path: the file.
        title: name of the run.
        config: the resolved job.
        models: metrics of the held-out range per model.
        history: one entry every ``train.log_every`` steps: ``step``, ``loss``, ``rows_per_second``, ``auc`` (behaviour
            -> progressive AUC or None) and the seconds of each of ``PHASES``.
        plan: placement of each table.
        calibration: behaviour -> (mean predicted, mean observed, rows) of the rows between two predicted probabilities.
    """
    pictures = [
        ("Loss of the training steps", _picture(lambda axes: _loss(axes, history))),
        (
            "Progressive AUC: each batch is predicted before it is trained on",
            _picture(lambda axes: _auc(axes, history)),
        ),
        ("Share of time by phase", _picture(lambda axes: _phases(axes, history))),
        ("Calibration on the held-out range", _picture(lambda axes: _calibration(axes, calibration))),
    ]
    template = resources.files(__package__).joinpath("report.html.jinja").read_text()
    page = jinja2.Environment(autoescape=True).from_string(template)
    path.write_text(
        page.render(
            title=title,
            metrics=metrics_table(models) if models else "",
            pictures=pictures,
            trained=bool(history),
            plan=plan,
            job=json.dumps(config, indent=1),
        )
    )


def _picture(draw: Callable[[Axes], None]) -> str:
    """Draw one set of axes; returns the SVG in base64."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _loss(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], color="#1f6f8b")
    axes.set(xlabel="step", ylabel="sum of the behaviours' losses, per row")


def _auc(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    for behaviour in history[0]["auc"] if history else ():
        points = [(entry["step"], entry["auc"][behaviour]) for entry in history if entry["auc"][behaviour] is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], label=behaviour)
    axes.set(xlabel="step", ylabel="AUC so far")
    if history:
        axes.legend(fontsize=8, ncols=2)


def _phases(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    steps = [entry["step"] for entry in history]
    totals = [sum(entry[phase] for phase in PHASES) or 1.0 for entry in history]
    shares = [[entry[phase] / total for entry, total in zip(history, totals, strict=True)] for phase in PHASES]
    if history:
        axes.stackplot(steps, shares, labels=PHASES, colors=("#9bc1bc", "#5d576b", "#ed6a5a", "#f4f1bb"))
        axes.legend(fontsize=8, ncols=4, loc="upper center")
        rate = axes.twinx()
        rate.plot(steps, [entry["rows_per_second"] for entry in history], color="black", linewidth=1)
        rate.set_ylabel("rows per second (line)")
    axes.set(xlabel="step", ylabel="share of the step", ylim=(0, 1))


def _calibration(axes: Axes, calibration: Mapping[str, Sequence[tuple[float, float, int]]]) -> None:
    for behaviour, bins in calibration.items():
        kept = [(predicted, observed) for predicted, observed, _ in bins if predicted > 0 and observed > 0]
        axes.plot([p for p, _ in kept], [o for _, o in kept], marker="o", markersize=3, label=behaviour)
    axes.plot([1e-4, 1], [1e-4, 1], color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="mean predicted probability", ylabel="share observed")
    if calibration:
        axes.legend(fontsize=8, ncols=2)
