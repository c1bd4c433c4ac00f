"""The page about a codebook version: distortion by level, use of the codes, perplexity, persistence, refresh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.report.charts import Series, line_chart, precise
from trainer.report.page_parts import JobPage, ReportSection, ReportTable, drawn, values_table
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, numbers, share_of, whole

UNUSED = 0.1
"""Share of unused codes above which there is a warning."""

CROWDED = 0.2
"""Share of the segments in the most frequent 1 % of the codes above which there is a warning."""


def codebook_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about a codebook version."""
    report, manifest = run.models[0].document, run.config
    vectors = mapping(manifest.get("vectors"))
    sizes = numbers(manifest.get("levels"))
    tiles = [
        ("version", str(manifest.get("name") or "")),
        ("levels", f"{len(sizes)}" if sizes else ""),
        ("dimension", whole(manifest.get("dim"))),
        ("fitted vectors", whole(vectors.get("count"))),
        ("held-out segments", whole(report.get("segments"))),
        ("refreshed from", str(manifest.get("matched_from") or "")),
    ]
    stored = report.get("levels")
    levels = [entry for entry in (stored if isinstance(stored, list) else ()) if isinstance(entry, dict)]
    return JobPage(tiles, list(_warnings(levels)), [_levels(levels), _use(levels), _tuples(report), _refresh(report)])


def _levels(levels: list[dict[str, Any]]) -> ReportSection:
    """Return distortion and use by level."""
    lines = {
        f"level {place}": {
            **level,
            **{key: _percent(level.get(key)) for key in ("of_variance", "unused", "top", "persistence")},
            "used": _percent(_used(level)),
            "even": _percent(share_of(level.get("perplexity"), level.get("codes"))),
        }
        for place, level in enumerate(levels, 1)
    }
    columns = {
        "codes": "codes",
        "distortion": "distortion",
        "of_variance": "% of the variance",
        "used": "codes used, %",
        "perplexity": "perplexity",
        "even": "perplexity / codes, %",
        "gini": "Gini",
        "top": "in the top 1 % of codes, %",
        "persistence": "persistence, %",
    }
    names = list(lines)
    charts = [
        line_chart(
            "Distortion after each level",
            "",
            "% of the vectors' variance",
            [Series.of("distortion", range(len(names)), [number(line["of_variance"]) for line in lines.values()])],
            names=names,
            zero=True,
        ),
        line_chart(
            "Codes by level",
            "",
            "%",
            [
                Series.of(name, range(len(names)), [number(line[key]) for line in lines.values()])
                for key, name in (
                    ("used", "codes used"),
                    ("even", "perplexity / codes"),
                    ("persistence", "persistence"),
                )
            ],
            names=names,
            zero=True,
        ),
    ]
    text = (
        "Segments that the codebook was not fitted on. The distortion is the mean squared error with this and the "
        "earlier levels. The perplexity is the number of equally frequent codes with the same entropy. Persistence is "
        "the share of neighbouring segments of a room with the same code."
    )
    return ReportSection("Held-out quality", text, values_table("", "", lines, columns), drawn(*charts))


def _use(levels: list[dict[str, Any]]) -> ReportSection:
    """Return the share of the segments that the most frequent codes hold."""
    series = []
    for place, level in enumerate(levels, 1):
        curve = numbers(level.get("curve"))
        step = 100 / max(len(curve) - 1, 1)
        shares = [None if value is None else min(100.0, 100 * value) for value in curve]
        series.append(Series.of(f"level {place}", [step * at for at in range(len(curve))], shares))
    chart = line_chart("Use of the codes", "% of the codes, the most frequent first", "% of the segments", series)
    text = "With equally frequent codes the curve is a straight line from 0 to 100 %."
    return ReportSection("Use of the codes", text, [], drawn(chart))


def _tuples(report: Mapping[str, Any]) -> ReportSection:
    """Return figures about the codes of all levels together."""
    tuples = mapping(report.get("tuples"))
    values = {
        "possible": number(tuples.get("possible")),
        "used": number(tuples.get("used")),
        "distinct vectors with a tuple of their own, %": _percent(tuples.get("alone")),
        "distinct vectors of the most frequent tuple": number(tuples.get("largest")),
        "persistence, %": _percent(tuples.get("persistence")),
        "segments": number(report.get("segments")),
        "distinct vectors": number(report.get("distinct_vectors")),
    }
    rows = [[name, precise(value)] for name, value in values.items() if value is not None]
    return ReportSection("Tuples of all levels", "", [ReportTable("", ["figure", "value"], rows)] if rows else [])


def _refresh(report: Mapping[str, Any]) -> ReportSection:
    """Return the shares of segments that keep their code over a refresh."""
    refresh = mapping(report.get("refresh"))
    kept = {name: mapping(values) for name, values in mapping(refresh.get("kept")).items()}
    levels = max((len(numbers(values.get("levels"))) for values in kept.values()), default=0)
    rows = [
        [
            name,
            *(precise(_percent(share)) for share in numbers(values.get("levels"))),
            precise(_percent(values.get("tuple"))),
        ]
        for name, values in kept.items()
        if len(numbers(values.get("levels"))) == levels
    ]
    header = ["start, numbers of the codes", *(f"level {place + 1}, %" for place in range(levels)), "all levels, %"]
    count = number(refresh.get("segments"))
    text = (
        f"Segments that keep their code{'' if count is None else f', of {count:,.0f}'}, beside the version "
        f"{refresh.get('from')}."
    )
    return ReportSection("Refresh", text, [ReportTable("", header, rows)] if rows else [])


def _used(level: Mapping[str, Any]) -> float | None:
    unused = number(level.get("unused"))
    return None if unused is None else 1 - unused


def _percent(share: object) -> float | None:
    value = number(share)
    return None if value is None else 100 * value


def _warnings(levels: list[dict[str, Any]]) -> Iterator[str]:
    for place, level in enumerate(levels, 1):
        unused, top = number(level.get("unused")), number(level.get("top"))
        if unused is not None and unused > UNUSED:
            yield f"Level {place}: {100 * unused:.0f} % of the codes are not used by the held-out segments."
        if top is not None and top > CROWDED:
            yield f"Level {place}: the most frequent 1 % of the codes hold {100 * top:.0f} % of the segments."
