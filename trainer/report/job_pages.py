"""The page of each kind of job but the ranker."""

from __future__ import annotations

from collections.abc import Callable

from trainer.report.align_page import align_page
from trainer.report.charts import precise
from trainer.report.codebook_page import codebook_page
from trainer.report.embedding_page import embedding_page, follow_page
from trainer.report.finetune_page import finetune_page
from trainer.report.foresight_page import foresight_page
from trainer.report.page_parts import JobPage, ReportSection, ReportTable
from trainer.report.run_facts import run_tiles
from trainer.report.run_warnings import run_warnings
from trainer.report.staytime_page import staytime_page
from trainer.report.stored_run import StoredRun
from trainer.report.training_sections import embedding_tables, throughput, training_curves

PAGES: dict[str, Callable[[StoredRun], JobPage]] = {
    "align": align_page,
    "embed": embedding_page,
    "embed --follow": follow_page,
    "finetune": finetune_page,
    "foresight": foresight_page,
    "quantize": codebook_page,
    "staytime": staytime_page,
}
"""Kind of a run, or the words of its command where the kind has no settings -> its page."""

_TRAINED_LIKE_A_RANKER = "align"


def job_page(run: StoredRun) -> JobPage:
    """Return the parts of the page about a run that is no ranker's; of an unknown job its metrics and curves."""
    kind = run.summary.kind or run.summary.job
    page = PAGES[kind](run) if kind in PAGES else JobPage(sections=[_stored_metrics(run)])
    sections = [*page.sections]
    if kind not in PAGES:
        sections.append(training_curves(run.models))
    if kind == _TRAINED_LIKE_A_RANKER:
        sections += [training_curves(run.models), throughput(run.models), embedding_tables(run)]
    return JobPage([*run_tiles(run), *page.tiles], [*run_warnings(run), *page.warnings], sections)


def _stored_metrics(run: StoredRun) -> ReportSection:
    """Return the metrics of a run by their names."""
    rows = [[name, precise(value)] for name, value in run.summary.metrics.items()]
    return ReportSection("Metrics", "", [ReportTable("", ["metric", "value"], rows)] if rows else [])
