"""The pages about Foresight's predictor: one that was trained and evaluated, and one that followed live segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.report.charts import Chart, Series, dot_chart, line_chart, share_chart
from trainer.report.history_charts import history_chart, loss_chart, stalls_text
from trainer.report.page_parts import JobPage, ReportSection, drawn, values_table
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, share_of, whole

MODEL, ALL, UNSEEN = "model", "all", "unseen authors"
METRICS = {"top_1": "top 1", "top_10": "top 10", "nll": "NLL (nats)"}


def foresight_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about a predictor."""
    document = run.models[0].document
    if "progressive" in document or any("progressive" in entry for entry in run.models[0].history):
        return _follow_page(run)
    rows, evaluation = mapping(document.get("rows")), mapping(document.get("evaluation"))
    tiles = [
        ("codebook", str(document.get("codebook") or "")),
        ("codes", whole(document.get("codes"))),
        ("training rows", whole(rows.get("training"))),
        ("held-out rows", whole(rows.get("held_out"))),
    ]
    return JobPage(tiles, list(_warnings(document)), [_quality(evaluation), _authors(document), _training(run)])


def _quality(evaluation: Mapping[str, Any]) -> ReportSection:
    """Return the predictor beside the rules: a table by group of rows, and charts."""
    groups = {name: mapping(values) for name, values in mapping(evaluation.get("quality")).items()}
    counts, tables, charts = mapping(evaluation.get("rows")), [], []
    reference = mapping(evaluation.get("reference"))
    for group, qualities in groups.items():
        lines = dict(qualities)
        if group == ALL and number(reference.get("accuracy")) is not None:
            lines["knows style and topic"] = {"top_1": reference["accuracy"]}
        n = number(counts.get(group))
        title = group if n is None else f"{group}: {n:,.0f} rows"
        tables += values_table(title, "", lines, METRICS)
    names = list(dict.fromkeys(name for qualities in groups.values() for name in qualities))
    for key, name in METRICS.items():
        series = [
            Series.of(group, range(len(names)), [number(mapping(qualities.get(name)).get(key)) for name in names])
            for group, qualities in groups.items()
        ]
        charts += drawn(dot_chart(f"Next code: {name}", name, names, series))
    text = (
        "The rules foresee the same held-out rows without a network; a smaller NLL is better. Top 10 counts the rows "
        "whose code is among the ten most probable ones."
    )
    return ReportSection("Foreseen beside the rules", text, tables, charts)


def _authors(document: Mapping[str, Any]) -> ReportSection:
    """Return the shares of held-out rows of authors with and without a row of training, and short contexts."""
    counts = mapping(mapping(document.get("evaluation")).get("rows"))
    total, unseen = number(counts.get(ALL)), number(counts.get(UNSEEN))
    rows = mapping(document.get("rows"))
    short = mapping(rows.get("short_contexts"))
    lines = {
        name: {"rows": rows.get(key), "short": short.get(key), "share": _percent(short.get(key), rows.get(key))}
        for name, key in (("training", "training"), ("held out", "held_out"))
    }
    chart = None
    if total and unseen is not None:
        shares = [("known authors", total - unseen), ("authors without a row of training", unseen)]
        chart = share_chart("Held-out rows by author", shares)
    return ReportSection(
        "Rows",
        "A context is short if it has fewer runs than data.runs.",
        values_table("", "range", lines, {"rows": "rows", "short": "short contexts", "share": "% of the rows"}),
        drawn(chart),
    )


def _percent(part: object, total: object) -> float | None:
    share = share_of(part, total)
    return None if share is None else 100 * share


def _training(run: StoredRun) -> ReportSection:
    charts = [
        *loss_chart(run, "Loss of a row, in nats (sampled codes)"),
        *history_chart(run, "Learning rate", "learning rate", {"learning_rate": "learning rate"}, zero=True),
    ]
    return ReportSection("Training", stalls_text(run), [], charts)


def _warnings(document: Mapping[str, Any]) -> Iterator[str]:
    qualities = mapping(mapping(mapping(document.get("evaluation")).get("quality")).get(ALL))
    own = mapping(qualities.get(MODEL))
    for name, values in qualities.items():
        better, mine = number(mapping(values).get("nll")), number(own.get("nll"))
        # The rule "bayes" knows the true distribution of a simulated world.
        if name not in (MODEL, "bayes") and better is not None and mine is not None and better < mine:
            yield f"The rule {name} has a smaller NLL than the predictor: {better:.4f}, {mine:.4f} here."
    yield from _without_author(mapping(document.get("rows")), "segments_without_author")


def _without_author(counts: Mapping[str, Any], key: str) -> Iterator[str]:
    if missing := number(counts.get(key)):
        yield f"{missing:,.0f} segments have no author and were left out."


def _follow_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about a predictor that followed live segments."""
    document = run.models[0].document
    segments, progressive = mapping(document.get("segments")), mapping(document.get("progressive"))
    slow = number(mapping(document.get("training")).get("slow_ticks"))
    tiles = [
        ("codebook", str(document.get("codebook") or "")),
        ("codes", whole(document.get("codes"))),
        ("forecast segments", whole(segments.get("forecast"))),
        ("foreseen rows", whole(progressive.get("rows"))),
    ]
    warnings = [*_without_author(segments, "without_author")]
    if slow:
        warnings.insert(
            0, f"{slow:,.0f} times the forecasts and steps of some ticks took longer than the ticks in event time."
        )
    words = {
        "forecast": "with a forecast",
        "earlier": "earlier than the first forecast",
        "later": "later than the last forecast",
        "without_author": "without an author",
        "short_contexts": "with fewer runs than data.runs",
    }
    lines = {name: {"segments": segments.get(key)} for key, name in words.items() if key in segments}
    quality = mapping(progressive.get("quality"))
    tables = values_table("All rows", "", quality, METRICS)
    text = "Each row is foreseen before the step that trains on it, by the predictor of before the step."
    return JobPage(
        tiles,
        warnings,
        [
            ReportSection("Foreseen beside the rules", text, tables, _progress(run)),
            _training(run),
            ReportSection("Segments", "", values_table("", "", lines, {"segments": "segments"})),
        ],
    )


def _progress(run: StoredRun) -> list[Chart]:
    """Return charts of the progressive quality against the rows."""
    records = [(number(entry.get("rows")) or 0.0, mapping(entry.get("progressive"))) for entry in run.models[0].history]
    if not any(quality for _, quality in records):
        stored = mapping(run.models[0].document.get("progressive")).get("records")
        records = [
            (number(entry.get("rows")) or 0.0, entry)
            for entry in (stored if isinstance(stored, list) else ())
            if isinstance(entry, dict)
        ]
    places, total = [], 0.0
    for rows, _ in records:
        total += rows
        places.append(total)
    names = dict.fromkeys(
        name for _, quality in records for name, values in quality.items() if isinstance(values, dict)
    )
    return drawn(
        *(
            line_chart(
                f"Progressive {label}",
                "rows",
                label,
                [
                    Series.of(name, places, [number(mapping(quality.get(name)).get(key)) for _, quality in records])
                    for name in names
                ],
            )
            for key, label in METRICS.items()
        )
    )
