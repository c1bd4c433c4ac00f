"""The report of a run: one page without scripts, made from the files of the run alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from trainer.checkpoint.runs import describe_state
from trainer.console.errors import UserError, one_line
from trainer.console.outputs import Output
from trainer.report.attention_section import attention_section
from trainer.report.compare import job_of
from trainer.report.job_pages import job_page
from trainer.report.job_text import job_lines
from trainer.report.page_parts import JobPage
from trainer.report.ranker_sections import calibration_section, held_out_metrics, parts_section
from trainer.report.room_curve import room_section
from trainer.report.run_facts import environment_rows, run_tiles, run_title
from trainer.report.run_warnings import run_warnings
from trainer.report.side_by_side import side_by_side
from trainer.report.stored_run import ReportedModel, StoredRun, read_model
from trainer.report.stream_section import stream_section, stream_warnings
from trainer.report.training_sections import embedding_tables, throughput, training_curves
from trainer.report.unknown_ids import unknown_id_warnings
from trainer.runtime.files import whole_file
from trainer.runtime.run_lock import is_locked

REPORT = "report.html"
METRICS = "metrics.json"

WATCH_SECONDS = 30
"""Time between two pages of a run that is watched."""

LOOK_SECONDS = 1.0
"""Time between two looks at whether a watched run still goes on."""

logger = logging.getLogger(__name__)


def write_report(
    directory: Path, out: Output | None = None, others: Sequence[Path] = (), against: Path | None = None
) -> None:
    """Write the report of a run, by default as ``report.html`` in its directory.

    Args:
        directory: of the run.
        out: file to write.
        others: runs that stand beside it in the page.
        against: run whose settings and metrics are the reference; see :func:`make_report`.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    _write(make_report(directory, others, against), out or Output.of(directory / REPORT))


def watch_report(
    directory: Path, out: Output | None = None, others: Sequence[Path] = (), against: Path | None = None
) -> None:
    """Write the report of a run again and again until no job runs there; the last page does not load itself again.

    A job may remove its directory at its end, as the fit of a codebook does. The page before that is the last one then.

    Raises:
        UserError: there is no run, or the page cannot be written.
        KeyboardInterrupt, Terminated: the user has stopped it; the last page is written.
    """
    place, page = out or Output.of(directory / REPORT), ""
    try:
        while is_locked(directory):
            latest = make_report(directory, others, against)
            _write(_loading_itself(latest), place)
            page = latest
            until = time.monotonic() + WATCH_SECONDS
            while is_locked(directory) and time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
        page = make_report(directory, others, against)
    except (OSError, UserError) as error:
        if not page:
            raise
        logger.warning(f"{directory}: is gone or damaged ({one_line(error)}); the page is the one before")
    finally:
        # A page that nobody writes any more must not load itself again.
        if page and (place.path is None or place.path.parent.exists()):
            _write(page, place)


def _write(page: str, place: Output) -> None:
    with place.writing(quiet=True) as file, whole_file(file) as tmp_path:
        tmp_path.write_text(page, encoding="utf-8")


def _loading_itself(page: str) -> str:
    """Return a page that a browser loads again from time to time."""
    head = "<head>\n"
    assert head in page
    return page.replace(head, f'{head}<meta http-equiv="refresh" content="{WATCH_SECONDS}">\n', 1)


def write_last_report(directory: Path) -> None:
    """Write the report at the end of a job, unless it is there already. A run does not fail because of its report."""
    file = directory / REPORT
    results = [directory / METRICS, *directory.glob(f"baselines/*/{METRICS}")]
    try:
        if not file.exists() or any(result.stat().st_mtime > file.stat().st_mtime for result in results):
            write_report(directory)
    except Exception as error:
        logger.warning(f"{file}: not written ({one_line(error)}); limelight report {directory} tries it again")
        logger.debug("", exc_info=True)


def make_report(directory: Path, others: Sequence[Path] = (), against: Path | None = None) -> str:
    """Return the page about a run.

    Args:
        directory: of the run.
        others: runs that stand beside it in tables and curves, and with which it is compared.
        against: another run that stands beside it: the differences are from this one, and the job file has its
            values where they are other ones.

    Raises:
        UserError: there is no run in one of the directories.
    """
    run = StoredRun.read(directory)
    models = run.models
    compared = [directory, *others] if against is None else [against, directory, *others]
    others = others if against is None else [against, *others]
    if others:
        beside = [replace(read_model(other), name=str(other)) for other in others]
        models = [replace(models[0], name=str(directory)), *models[1:], *beside]
    parts = _ranker_page(run, models) if run.summary.kind == "ranker" else job_page(run)
    beside_sections = side_by_side(compared) if others else []
    # The metrics come first, then the other runs, then the rest.
    sections = [*parts.sections[:1], *beside_sections, *parts.sections[1:]]
    lines = job_lines(run.config, run.summary.kind, _other_job(run, against))
    return _template().render(
        title=run_title(run),
        directory=str(directory),
        kind=run.summary.job or "unknown job",
        state=run.summary.state,
        described=describe_state(run.summary),
        tiles=[(name, value) for name, value in parts.tiles if value],
        notes=run.notes,
        warnings=parts.warnings,
        sections=[section for section in sections if section.tables or section.charts],
        lines=lines,
        changed=sum(line.changed for line in lines),
        differing=None if against is None else sum(line.differs for line in lines),
        against=str(against),
        environment=environment_rows(run),
    )


def _other_job(run: StoredRun, against: Path | None) -> Mapping[str, Any] | None:
    """Return the job of the run that is compared with; None, with a note, if it cannot be read."""
    if against is None:
        return None
    try:
        return job_of(against)
    except (OSError, UserError) as error:
        run.notes.append(f"The job file is not compared: {one_line(error)}")
        return None


@cache
def _template() -> jinja2.Template:
    text = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def _ranker_page(run: StoredRun, models: Sequence[ReportedModel]) -> JobPage:
    """Return the parts of a page about a ranker, with the models that stand beside it."""
    return JobPage(
        run_tiles(run),
        [*run_warnings(run), *unknown_id_warnings(run), *stream_warnings(run)],
        [
            *held_out_metrics(models),
            stream_section(run),
            *parts_section(run),
            room_section(run.models[0].held_out),
            attention_section(run.attention),
            training_curves(models),
            calibration_section(run),
            throughput(models),
            embedding_tables(run),
        ],
    )
