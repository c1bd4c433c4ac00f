"""Several runs in one page: metrics with paired intervals, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.report.charts import precise
from trainer.report.compare import Difference, compare_runs, shown_setting
from trainer.report.page_parts import ReportSection, ReportTable


def side_by_side(directories: Sequence[Path]) -> list[ReportSection]:
    """Return the comparison of runs: metrics on the rows that all of them have, and the settings that differ."""
    comparison = compare_runs([str(directory) for directory in directories])
    first, *names = [run.directory for run in comparison.runs]
    paired = any(line.differences for line in comparison.metrics)
    header = ["metric", first, *names, *(f"{name} − {first}" for name in names if paired)]
    rows = [
        [line.name, *map(precise, line.values), *(_interval_of(difference) for difference in line.differences)]
        for line in comparison.metrics
    ]
    settings = [[key, *map(shown_setting, values)] for key, values in comparison.settings.items()]
    tables = [ReportTable("", header, rows)] if rows else []
    tables += (
        [ReportTable("Settings that differ", ["key", first, *names], settings, 2 + len(names))] if settings else []
    )
    text = ". ".join(f"{note[:1].upper()}{note[1:]}" for note in comparison.notes) + "."
    if paired:
        text += " Brackets are 95 % intervals over users; every run is measured on the same draws."
    return [ReportSection("Side by side", text, tables)]


def _interval_of(difference: Difference) -> str:
    if difference.value is None or difference.low is None or difference.high is None:
        return "–"
    return f"{difference.value:+.4f} ({difference.low:+.4f}, {difference.high:+.4f})"
