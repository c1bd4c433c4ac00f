"""The section about a stream: events by outcome, rows by kind, progressive metrics, freshness and lag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.report.charts import Series, line_chart, precise
from trainer.report.metric_history import cumulated
from trainer.report.page_parts import ReportSection, ReportTable, drawn, values_table
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, share_of

COUNTS = {
    "events": ("events", None),
    "before_start": ("events before the stream's start, skipped", None),
    "late": ("events behind the watermark, unused", "events"),
    "no_open_visit": ("events without an open visit, unused", "events"),
    "requests": ("requests predicted", None),
    "without_features": ("requests without logged features", "requests"),
    "unanswered": ("outcomes of requests that were not predicted", "requests"),
    "rows_fast": ("rows after the fast window", None),
    "rows_slow": ("rows that correct a fast row", None),
    "rows_report": ("rows that report a positive", None),
    "rows_exit": ("rows at the exit", None),
    "rows_full": ("rows at the end of the visit", None),
}
"""Key of a count -> its words, and the count of which it is a part."""

PROGRESSIVE = {
    **{"auc": "AUC", "gauc": "GAUC", "logloss": "logloss", "ne": "NE", "calibration": "calibration"},
    **{"positives": "positives", "rows": "rows"},
}

LOST = 0.01
"""Share of the events or requests that changed nothing above which there is a warning."""

BEHIND = 60.0
"""Seconds of lag at the end above which a growing lag is a warning."""


def stream_section(run: StoredRun) -> ReportSection:
    """Return counts, freshness and lag of a stream."""
    stream = mapping(run.models[0].document.get("stream"))
    tables = _counts(mapping(stream.get("counts")))
    progressive = mapping(stream.get("progressive"))
    tables += values_table("Predicted at the request, before any outcome", "behaviour", progressive, PROGRESSIVE)
    fresh = mapping(stream.get("freshness_seconds"))
    rows = [
        [name.replace("_", " "), precise(number(value))] for name, value in fresh.items() if number(value) is not None
    ]
    tables += (
        [ReportTable("Freshness: arrival of an event to its training step", ["quantile", "seconds"], rows)]
        if rows
        else []
    )
    history = run.models[0].history
    places = cumulated(history, "rows")
    charts = drawn(
        *(
            line_chart(title, "rows", label, [Series.of("lag", places, [number(entry.get(key)) for entry in history])])
            for title, label, key in (
                ("Lag behind the source in event time", "seconds", "lag_seconds"),
                ("Events that wait", "events", "lag_events"),
            )
        )
    )
    return ReportSection("Stream", f"{_replay(run)} {_users(mapping(stream.get('users')))}".strip(), tables, charts)


def _replay(run: StoredRun) -> str:
    """Return what the lag of a replay means; empty for other streams."""
    settings = mapping(run.config.get("stream"))
    if settings.get("source") != "files" or number(settings.get("speed")):
        return ""
    return "Stored events were replayed as fast as possible, so the lag is what was left of the log."


def _counts(counts: Mapping[str, Any]) -> list[ReportTable]:
    """Return the table of counts, those that the page has no words for by their names."""
    rows = []
    for key, value in counts.items():
        count = number(value)
        words, of = COUNTS.get(key, (key.replace("_", " "), None))
        # A policy makes rows of one or two kinds; the others would be noise.
        if key.startswith("rows_") and not count:
            continue
        share = share_of(value, counts.get(of)) if of else None
        rows.append([words, precise(count), "" if share is None else f"{100 * share:.2f} % of the {of}"])
    return [ReportTable("Events, requests and rows", ["count of", "number", "share"], rows)] if rows else []


def _users(users: Mapping[str, Any]) -> str:
    twice, seen = number(users.get("in_two_partitions")), number(users.get("seen"))
    if twice is None or seen is None:
        return ""
    return f"{twice:,.0f} of {seen:,.0f} users have events in two partitions of the topic."


def stream_warnings(run: StoredRun) -> Iterator[str]:
    """Yield what a reader should know about a stream: lost events and requests, and a lag that grows."""
    stream = mapping(run.models[0].document.get("stream"))
    counts = mapping(stream.get("counts"))
    for key, (words, of) in COUNTS.items():
        share = share_of(counts.get(key), counts.get(of)) if of else None
        if share is not None and share > LOST:
            yield f"{100 * share:.1f} % of the {of} are {words}."
    if twice := number(mapping(stream.get("users")).get("in_two_partitions")):
        yield f"{twice:,.0f} users have events in two partitions of the topic, so that labels are lost."
    lags = [lag for entry in run.models[0].history if (lag := number(entry.get("lag_seconds"))) is not None]
    middle = lags[len(lags) // 2] if lags else 0.0
    if lags and lags[-1] > max(BEHIND, 2 * middle):
        yield f"The lag grows: {middle:,.0f} s half-way, {lags[-1]:,.0f} s at the end."
