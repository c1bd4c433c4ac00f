"""The pages about embeddings: tables of vectors that a job has written, and one that follows live segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.console.text_table import size_text
from trainer.data.format.content_vectors import MANIFEST, read_manifest
from trainer.report.charts import Series, line_chart
from trainer.report.page_parts import JobPage, ReportSection, ReportTable, drawn, values_table
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, whole
from trainer.runtime.stored_files import file_inside, load_array, parse_json_object, read_limited
from trainer.semantic_ids.follow_report import COUNTS, METRICS, QUANTILES

SAMPLE = 512
"""Vectors of a table that are compared with each other."""

LOST = 0.05
"""Share of the texts that are refused, cut or empty above which there is a warning."""

ALIKE = 0.95
"""Mean cosine of two vectors above which there is a warning."""

_COUNTS = {
    "embedded": "embedded",
    "kept": "kept from before",
    "truncated": "texts cut",
    "empty": "empty texts",
    "refused": "not finite",
}


def embedding_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about tables of vectors."""
    lines: dict[str, dict[str, Any]] = {}
    origins: list[list[str]] = []
    warnings: list[str] = []
    for folder in sorted(file.parent for file in run.directory.glob(f"*/{MANIFEST}")):
        name = folder.name
        try:
            manifest = read_manifest(folder)
            cosine, length = _alike(folder, manifest)
        except (OSError, UserError) as error:
            run.notes.append(one_line(error))
            continue
        origin = mapping(manifest.get("origin"))
        counts = mapping(origin.get("counts"))
        lines[name] = {
            **counts,
            **{key: manifest.get(key) for key in ("count", "dim")},
            "cosine": cosine,
            "length": length,
        }
        origins.append([name, str(manifest.get("dtype", "")), *(str(origin.get(key, "")) for key in _ORIGIN)])
        warnings += _warnings(name, lines[name])
    total = sum(number(line.get("count")) or 0 for line in lines.values())
    size = sum(file.stat().st_size for file in run.directory.glob("*/vectors-*.npy"))
    tiles = [
        ("tables", whole(len(lines)) if lines else ""),
        ("vectors", f"{total:,.0f}" if lines else ""),
        ("size of the vectors", size_text(size) if size else ""),
    ]
    columns = {"count": "vectors", "dim": "dim", **_COUNTS, "length": "mean length", "cosine": "mean cosine"}
    text = (
        f"The mean length and the mean cosine of two vectors are of {SAMPLE} vectors of each table; a cosine near 1 "
        "means that the vectors hardly tell the texts apart."
    )
    tables = values_table("", "table", lines, columns)
    if origins:
        tables.append(ReportTable("Origin", ["table", "type", *_ORIGIN], origins, 2 + len(_ORIGIN)))
    return JobPage(tiles, warnings, [ReportSection("Tables of vectors", text, tables)])


_ORIGIN = ("model", "adapter", "pooling", "hash")


def _alike(folder: Path, manifest: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the mean cosine of two different vectors of a table, and their mean length, from a sample.

    Raises:
        UserError: the vectors cannot be read.
    """
    name = mapping(manifest.get("files")).get("vectors")
    vectors = load_array(file_inside(folder, name), 2)
    rows = np.unique(np.linspace(0, max(len(vectors) - 1, 0), SAMPLE).astype(np.int64))[: len(vectors)]
    sample = vectors[rows].astype(np.float64)
    lengths = np.linalg.norm(sample, axis=1)
    sample = sample[lengths > 0] / lengths[lengths > 0, None]
    n = len(sample)
    mean_length = float(lengths.mean()) if len(lengths) else None
    if n < 2:
        return None, mean_length
    # The sum over all pairs is the square of the sum's length, less the n products of a vector with itself.
    return float((np.square(sample.sum(0)).sum() - n) / (n * (n - 1))), mean_length


def _warnings(name: str, line: Mapping[str, Any]) -> Iterator[str]:
    made = (number(line.get("embedded")) or 0) + (number(line.get("refused")) or 0)
    for key, words in (("truncated", "were cut"), ("refused", "have no finite vector")):
        count = number(line.get(key)) or 0
        if count > LOST * made:
            yield f"{name}: {count:,.0f} of {made:,.0f} embedded texts {words}."
    empty, total = number(line.get("empty")) or 0, number(line.get("count")) or 0
    if empty > LOST * (total + empty):
        yield f"{name}: {empty:,.0f} texts are empty and have no vector."
    cosine = number(line.get("cosine"))
    if cosine is not None and cosine > ALIKE:
        yield f"{name}: two vectors have a cosine of {cosine:.3f} on average, so they hardly tell the texts apart."


def follow_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about a job that embeds the segments of live rooms."""
    entries = _entries(run)
    times = [number(entry.get("time_ms")) for entry in entries]
    began = next((time for time in times if time is not None), 0.0)
    minutes = [((time if time is not None else began) - began) / 60_000 for time in times]
    totals = {key: sum(number(entry.get(key)) or 0 for entry in entries) for key in COUNTS}
    tiles = [("segments embedded", f"{totals['embedded']:,.0f}" if entries else "")]
    lags = [
        Series.of(name, minutes, [number(mapping(entry.get("lag_seconds")).get(name)) for entry in entries])
        for name in QUANTILES
    ]
    rates = [
        Series.of(words, minutes, [number(entry.get(key)) for entry in entries])
        for key, words in (("needed_per_second", "become known"), ("reached_per_second", "the model reaches"))
    ]
    counts = {words: {"segments": totals[key]} for key, words in COUNTS.items()} if entries else {}
    halved = sum(1 for entry in entries if entry.get("halved") is True)
    warnings = [
        f"{totals[key]:,.0f} segments are {COUNTS[key]}."
        for key in ("late", "dropped", "rejected", "conflicting")
        if totals[key]
    ]
    if halved:
        warnings.append(f"In {halved:,} of {len(entries):,} reports only every second segment was embedded.")
    return JobPage(
        tiles,
        warnings,
        [
            ReportSection(
                "Lag",
                "Seconds from the moment when a segment was known until its vector was stored.",
                [],
                drawn(
                    line_chart("Lag of the segments", "minutes since the first report", "seconds", lags, zero=True),
                    line_chart("Segments per second", "minutes since the first report", "segments/s", rates, zero=True),
                ),
            ),
            ReportSection("Segments by outcome", "", values_table("", "", counts, {"segments": "segments"})),
        ],
    )


def _entries(run: StoredRun) -> list[Mapping[str, Any]]:
    """Return the reports of a job that follows; lines that are cut or no objects are left out with a note."""
    file = run.directory / METRICS
    try:
        lines = read_limited(file).splitlines()
    except FileNotFoundError:
        run.notes.append(f"{METRICS} is not there: the job has reported nothing yet.")
        return []
    except (OSError, UserError) as error:
        run.notes.append(one_line(error))
        return []
    found: list[Mapping[str, Any]] = []
    for line in lines:
        with suppress(UserError):
            found.append(parse_json_object(line, file))
    if len(found) < len(lines):
        run.notes.append(f"{file}: {len(lines) - len(found):,} of {len(lines):,} lines cannot be read.")
    return found
