"""What a person wants to see of a run: the metrics table, and a self-contained ``report.html`` with pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.console.text_table import text_table
from trainer.runtime.phase_timer import PHASES

COLUMNS = ("auc", "gauc", "uauc", "logloss", "ne", "calibration", "positives", "rows")
"""Metrics of the table, in order; ``best auc`` follows where the truth is known."""


Metrics = Mapping[str, Mapping[str, float | int | None]]
"""Behaviour -> metric -> value, None where undefined."""


def metrics_table(models: Mapping[str, Metrics]) -> str:
    """Plain text table of one model or several: a line per behaviour and model, undefined shown as ``-``."""
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
    trace: Sequence[Mapping[str, Any]],
    plan: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Sequence[tuple[float, float, int]]],
) -> None:
    """Write ``report.html``.

    Args:
        path: the file.
        title: name of the run.
        config: the resolved job.
        models: metrics of the held-out range per model.
        trace: one entry every ``train.log_every`` steps: ``step``, ``loss``, ``rows_per_second``, ``auc`` (behaviour ->
            progressive AUC or None) and the seconds of each of ``PHASES``.
        plan: how the tables were laid out.
        calibration: behaviour -> (mean predicted, mean observed, rows) of the rows between two predicted probabilities.
    """
    pictures = [
        ("Loss while training", _picture(lambda axes: _loss(axes, trace))),
        ("Progressive AUC: each batch predicted before it is learnt", _picture(lambda axes: _progressive(axes, trace))),
        ("Where the time goes", _picture(lambda axes: _phases(axes, trace))),
        ("Calibration on the held-out range", _picture(lambda axes: _calibration(axes, calibration))),
    ]
    figures = "".join(f"<figure><figcaption>{name}</figcaption>{image}</figure>" for name, image in pictures)
    plan_rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in entry.values()) + "</tr>" for entry in plan
    )
    plan_head = "".join(f"<th>{html.escape(name)}</th>" for name in (plan[0] if plan else {}))
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: 13px; }}
section.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figure svg {{ width: 100%; height: auto; }} figcaption {{ font-weight: 600; }}
table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ border: 1px solid #ddd; padding: .2rem .5rem; text-align: left; }}
</style>
<h1>{html.escape(title)}</h1>
<h2>Held-out metrics</h2>
<pre>{html.escape(metrics_table(models)) if models else "no held-out range was asked for"}</pre>
<section class="pictures">{figures}</section>
<h2>Tables</h2>
<table><tr>{plan_head}</tr>{plan_rows}</table>
<h2>Job</h2>
<pre>{html.escape(json.dumps(config, indent=1))}</pre>
</html>
"""
    )


def _picture(draw: Any) -> str:
    """An inline SVG of one set of axes."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" style="width:100%" src="data:image/svg+xml;base64,{encoded}">'


def _loss(axes: Axes, trace: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([entry["step"] for entry in trace], [entry["loss"] for entry in trace], color="#1f6f8b")
    axes.set(xlabel="step", ylabel="sum of the behaviours' losses, per row")


def _progressive(axes: Axes, trace: Sequence[Mapping[str, Any]]) -> None:
    for behaviour in trace[0]["auc"] if trace else ():
        points = [(entry["step"], entry["auc"][behaviour]) for entry in trace if entry["auc"][behaviour] is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], label=behaviour)
    axes.set(xlabel="step", ylabel="AUC so far")
    if trace:
        axes.legend(fontsize=8, ncols=2)


def _phases(axes: Axes, trace: Sequence[Mapping[str, Any]]) -> None:
    steps = [entry["step"] for entry in trace]
    totals = [sum(entry[phase] for phase in PHASES) or 1.0 for entry in trace]
    shares = [[entry[phase] / total for entry, total in zip(trace, totals, strict=True)] for phase in PHASES]
    if trace:
        axes.stackplot(steps, shares, labels=PHASES, colors=("#9bc1bc", "#5d576b", "#ed6a5a", "#f4f1bb"))
        axes.legend(fontsize=8, ncols=4, loc="upper center")
        rate = axes.twinx()
        rate.plot(steps, [entry["rows_per_second"] for entry in trace], color="black", linewidth=1)
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
