"""Parts of which a page is made: tables, and sections with tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.charts import Chart


@dataclass(frozen=True)
class ReportTable:
    """A table of the page.

    Attributes:
        title: heading.
        header: names of the columns.
        rows: texts of the cells.
        texts: number of the first columns that are texts.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


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
