"""The section about a stream: counts, freshness and lag."""

from __future__ import annotations

from trainer.report.charts import Series, line_chart, precise
from trainer.report.metric_history import cumulated
from trainer.report.page_parts import ReportSection, ReportTable, drawn
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number


def stream_section(run: StoredRun) -> ReportSection:
    """Return counts, freshness and lag of a stream."""
    stream = mapping(run.models[0].document.get("stream"))
    counts = [[name.replace("_", " "), precise(number(value))] for name, value in mapping(stream.get("counts")).items()]
    fresh = [
        [name.replace("_", " "), precise(number(value))]
        for name, value in mapping(stream.get("freshness_seconds")).items()
        if number(value) is not None
    ]
    tables = [ReportTable("Events", ["count of", "number"], counts)] if counts else []
    tables += [ReportTable("Freshness", ["quantile", "seconds"], fresh)] if fresh else []
    history = run.models[0].history
    lags = [number(entry.get("lag_seconds")) for entry in history]
    chart = line_chart("Lag behind the source", "rows", "seconds", [Series.of("lag", cumulated(history, "rows"), lags)])
    return ReportSection("Stream", "", tables, drawn(chart))
