"""Parts of which a page is made: tables, and sections with tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.charts import Chart, precise
from trainer.report.stored_values import mapping, number


@dataclass(frozen=True)
class ReportTable:
    """A table of the page.

    Attributes:
        title: heading.
        header: names of the columns.
        rows: texts of the cells.
        texts: number of the first columns that are texts.
        text: sentences between heading and table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    text: str = ""


@dataclass(frozen=True)
class ReportSection:
    """A section of the page: heading, sentences, tables and charts."""

    title: str
    text: str = ""
    tables: Sequence[ReportTable] = ()
    charts: Sequence[Chart] = ()


def drawn(*charts: Chart | None) -> list[Chart]:
    """Return the charts that have data."""
    return [chart for chart in charts if chart is not None]


@dataclass(frozen=True)
class JobPage:
    """Parts of a page that depend on the kind of the job.

    Attributes:
        tiles: figures at the top: name and value; an empty value is left out.
        warnings: sentences that come before the figures.
        sections: of the page; empty ones are left out.
    """

    tiles: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[ReportSection] = ()


def values_table(title: str, first: str, lines: Mapping[str, Any], columns: Mapping[str, str]) -> list[ReportTable]:
    """Return a table with a line for each mapping of values; no table without lines, and no column without values.

    Args:
        title: heading of the table.
        first: heading of the names of the lines.
        lines: name -> mapping of values; anything else has no values.
        columns: key of a value -> heading.
    """
    values = {name: mapping(line) for name, line in lines.items()}
    used = [key for key in columns if any(number(line.get(key)) is not None for line in values.values())]
    if not used:
        return []
    rows = [[name, *(precise(number(line.get(key))) for key in used)] for name, line in values.items()]
    return [ReportTable(title, [first, *(columns[key] for key in used)], rows)]
