"""Sections about a ranker: metrics of its held-out rows, of parts of them, and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainer.report.charts import Chart, Point, Series, dot_chart, line_chart, precise
from trainer.report.held_out import DRAWS, PART_DRAWS, SHOWN, metrics_with_intervals, parts_of
from trainer.report.page_parts import ReportSection, ReportTable, drawn
from trainer.report.stored_run import ReportedModel, StoredRun
from trainer.report.stored_values import mapping, number


def held_out_metrics(models: Sequence[ReportedModel]) -> list[ReportSection]:
    """Return the metrics of the held-out range: a table, and AUC beside the other models and the best possible."""
    intervals = [metrics_with_intervals(model.held_out) if model.held_out is not None else {} for model in models]
    names = list(dict.fromkeys(name for model in models for name in model.behaviours))
    if not names:
        return []
    best = any("best_auc" in values for model in models for values in model.behaviours.values())
    header = ["behaviour", *(["model"] if len(models) > 1 else []), "AUC", "GAUC", *(["best AUC"] if best else [])]
    header += ["logloss", "NE", "calibration", "positives", "rows"]
    rows, series = [], []
    for model, spread in zip(models, intervals, strict=True):
        points = [_with_interval(model.behaviours.get(name, {}), spread.get(name, {}), "auc") for name in names]
        series.append(Series(model.name, range(len(names)), points))
    if best:
        own = models[0].behaviours
        series.append(
            Series.of("best possible", range(len(names)), [number(own.get(name, {}).get("best_auc")) for name in names])
        )
    for name in names:
        for model, spread in zip(models, intervals, strict=True):
            values = model.behaviours.get(name, {})
            cells = [name, *([model.name] if len(models) > 1 else [])]
            cells += [_interval(_with_interval(values, spread.get(name, {}), metric)) for metric in ("auc", "gauc")]
            if best:
                cells.append(precise(number(values.get("best_auc"))))
            cells += [
                precise(number(values.get(metric))) for metric in ("logloss", "ne", "calibration", "positives", "rows")
            ]
            rows.append(cells)
    text = f"Brackets are 95 % intervals over users (bootstrap, {DRAWS} draws)." if any(intervals) else ""
    text += (
        " The best AUC is that of the true probabilities, which this simulated world knows."
        if best
        else " No true probabilities are known, so the best possible AUC is not known either."
    )
    chart = dot_chart("AUC of the held-out range", "AUC", names, series)
    table = ReportTable("", header, rows, 2 if len(models) > 1 else 1)
    return [ReportSection("Held-out metrics", text.strip(), [table], drawn(chart))]


def _with_interval(values: Mapping[str, Any], spread: Mapping[str, Point | None], metric: str) -> Point | None:
    """Return a metric of all rows with the interval of the rows that are kept."""
    value, kept = number(values.get(metric)), spread.get(metric)
    if value is None:
        return None
    return Point(value) if kept is None else Point(value, kept.low, kept.high)


def _interval(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point.value:.4f}" + ("" if point.low is None else f" ({point.low:.4f}, {point.high:.4f})")


def parts_section(run: StoredRun) -> list[ReportSection]:
    """Return the AUC by activity, popularity and hour; nothing without kept rows."""
    held_out = run.models[0].held_out
    if held_out is None or not len(held_out.visit_id):
        return []
    charts = []
    for part in parts_of(held_out):
        # A part of all rows says nothing that the metrics do not say.
        if len(part.names) > 1:
            chart = line_chart(part.title, "", "AUC", part.series, names=part.names)
            if chart is not None:
                cells = [[*line, f"{rows:,}"] for line, rows in zip(chart.rows, part.rows, strict=True)]
                charts.append(replace(chart, header=[*chart.header, "rows"], rows=cells))
    text = (
        f"The {SHOWN} behaviours with the most positives, and by hour the first of them. Bars are 95 % intervals over "
        f"users ({PART_DRAWS} draws)."
    )
    return [ReportSection("Where it is good and bad", text, [], charts)] if charts else []


def calibration_section(run: StoredRun) -> ReportSection:
    """Return predicted against observed probabilities, with the numbers of rows."""
    curves = mapping(run.models[0].document.get("calibration_curves"))
    series, rows = [], []
    for name, bins in curves.items():
        known = [
            [float(value) for value in entry]
            for entry in (bins if isinstance(bins, list) else ())
            if isinstance(entry, list) and len(entry) == 3 and all(number(value) is not None for value in entry)
        ]
        series.append(Series.of(name, [entry[0] for entry in known], [entry[1] for entry in known]))
        rows += [[name, precise(p), precise(y), f"{n:,.0f}", f"{y * n:,.0f}"] for p, y, n in known]
    chart = line_chart(
        "Observed share against the mean prediction",
        "mean prediction",
        "observed share",
        series,
        logarithmic=True,
        diagonal=True,
    )
    if chart is None:
        return ReportSection("Calibration")
    chart = Chart(
        chart.title,
        chart.svg,
        chart.legend,
        ["behaviour", "mean prediction", "observed share", "rows", "positives"],
        rows,
    )
    text = (
        "On the thin line a prediction of 10 % comes true in 10 % of the rows. Bins without a positive are not drawn."
    )
    return ReportSection("Calibration", text, [], [chart])
