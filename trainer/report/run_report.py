"""The report of a run: one page without scripts, made from the files of the run alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from trainer.checkpoint.runs import describe_state
from trainer.console.errors import one_line
from trainer.console.outputs import Output
from trainer.console.text_table import duration_text, size_text
from trainer.metrics.user_bootstrap import interval
from trainer.report.charts import Chart, Point, Series, dot_chart, line_chart, precise, share_chart
from trainer.report.compare import Difference, compare_runs, shown_setting
from trainer.report.held_out import DRAWS, PART_DRAWS, SHOWN, UserDraws, metrics_with_intervals, parts_of
from trainer.report.job_text import job_lines
from trainer.report.stored_run import Entry, ReportedModel, StoredRun
from trainer.runtime.files import whole_file
from trainer.runtime.phase_timer import PHASES
from trainer.runtime.run_lock import is_locked

REPORT = "report.html"
METRICS = "metrics.json"

WATCH_SECONDS = 30
"""Time between two pages of a run that is watched."""

logger = logging.getLogger(__name__)

FEW_POSITIVES = 100
"""Positives of a behaviour below which its metrics are mostly chance."""

CALIBRATED = (0.8, 1.25)
"""Range of a calibration without a warning."""

_WAITING = 0.3
"""Share of the time spent on waiting for data above which there is a warning."""

_STALLED = 0.1
_SKIPPED = 0.001
_UNSERVED = 0.5
_PHASE_NAMES = {
    "data": "waiting for data",
    "tables": "tables",
    "dense": "network",
    "communication": "waiting for other ranks",
}


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


def write_report(
    directory: Path, out: Output | None = None, others: Sequence[Path] = (), *, refresh: bool = False
) -> None:
    """Write the report of a run, by default as ``report.html`` in its directory.

    Args:
        directory: of the run.
        out: file to write.
        others: runs that stand beside it in the page.
        refresh: a browser loads the page again from time to time.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    page = make_report(directory, others, refresh=refresh)
    with (out or Output.of(directory / REPORT)).writing(quiet=True) as file, whole_file(file) as tmp_path:
        tmp_path.write_text(page, encoding="utf-8")


def watch_report(directory: Path, out: Output | None = None, others: Sequence[Path] = ()) -> None:
    """Write the report of a run again and again until no job runs there; the last page does not refresh itself.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    while is_locked(directory):
        write_report(directory, out, others, refresh=True)
        time.sleep(WATCH_SECONDS)
    write_report(directory, out, others)


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


def make_report(directory: Path, others: Sequence[Path] = (), *, refresh: bool = False) -> str:
    """Return the page about a run.

    Args:
        directory: of the run.
        refresh: a browser loads the page again from time to time.
        others: runs that stand beside it in tables and curves, and with which it is compared.

    Raises:
        UserError: there is no run.
    """
    run = StoredRun.read(directory)
    models = run.models
    if others:
        beside = [replace(StoredRun.read(other).models[0], name=str(other)) for other in others]
        models = [replace(models[0], name=str(directory)), *models[1:], *beside]
    ranker = run.summary.kind == "ranker"
    sections = _quality(models) if ranker else [_metrics(run)]
    sections += _against([directory, *others]) if others else []
    sections += _parts(run) if ranker else []
    sections += [_curves(models), _calibration(run), _speed(models), _tables(run), _stream(run)]
    lines = job_lines(run.config, run.summary.kind)
    template = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        title=_title(run),
        refresh=WATCH_SECONDS if refresh else 0,
        directory=str(directory),
        kind=run.summary.job or "unknown job",
        state=run.summary.state,
        described=describe_state(run.summary),
        tiles=_tiles(run),
        notes=run.notes,
        warnings=_warnings(run),
        sections=[section for section in sections if section.tables or section.charts],
        lines=lines,
        changed=[line.text for line in lines if line.changed],
        environment=_environment(run),
    )


def _title(run: StoredRun) -> str:
    name = run.config.get("run", {}).get("name") if isinstance(run.config.get("run"), dict) else None
    return f"{name or run.directory.resolve().name}: {run.models[0].name}"


def _tiles(run: StoredRun) -> list[tuple[str, str]]:
    """Return the figures at the top: name and value."""
    training = _dict(run.models[0].document.get("training"))
    summary = run.summary
    rows = _float(training.get("rows"))
    # A run that has not ended has the rows of its records only.
    if rows is None:
        rows = sum(_float(entry.get("rows")) or 0 for entry in run.models[0].history) or None
    tiles = [("rows trained on", f"{rows:,.0f}" if rows is not None else ""), ("steps", _whole(summary.steps))]
    rate = summary.rows_per_second
    tiles.append(("rows per second", f"{rate:,.0f}" if rate is not None else ""))
    if seconds := _training_seconds(run.models[0].history):
        tiles.append(("time of training", duration_text(seconds)))
    held = next((values.get("rows") for values in run.models[0].behaviours.values()), None)
    tiles.append(("held-out rows", _whole(held)))
    if run.starts:
        tiles.append(("ranks", _whole(run.starts[-1].get("ranks"))))
    if run.status is not None and run.status.peak_memory_bytes:
        tiles.append(("peak memory of the first rank", size_text(run.status.peak_memory_bytes)))
    return [(name, value) for name, value in tiles if value]


def _warnings(run: StoredRun) -> list[str]:
    """Return what a reader should know before the figures."""
    found = []
    summary, own = run.summary, run.models[0]
    if summary.state in ("failed", "damaged"):
        found.append(f"The run is {describe_state(summary)}.")
    for name, values in own.behaviours.items():
        positives, calibration = _float(values.get("positives")), _float(values.get("calibration"))
        if positives is not None and positives < FEW_POSITIVES:
            found.append(f"{name} has {positives:,.0f} positives in the held-out range: its metrics are mostly chance.")
        elif calibration is not None and not CALIBRATED[0] <= calibration <= CALIBRATED[1]:
            found.append(f"{name} is predicted {calibration:.2f} times as often as it happens.")
        for other in run.models[1:]:
            better, mine = _float(other.behaviours.get(name, {}).get("auc")), _float(values.get("auc"))
            if better is not None and mine is not None and better > mine and _is_clear(own, other, name):
                found.append(f"The baseline {other.name} has a higher AUC of {name}: {better:.4f}, {mine:.4f} here.")
    for model in run.models:
        found += _training_warnings(model, f"{model.name}: " if len(run.models) > 1 else "")
    if own.held_out is not None and own.held_out.sampled:
        found.append(
            f"Intervals and parts are of a sample of the users ({len(own.held_out.visit_id):,} rows); metrics are of "
            "all rows."
        )
    return found


def _is_clear(own: ReportedModel, other: ReportedModel, behaviour: str) -> bool:
    """True if the AUC of another model is higher beyond its interval; also if the rows are not kept."""
    ours, theirs = own.held_out, other.held_out
    if ours is None or theirs is None or not np.array_equal(ours.visit_id, theirs.visit_id):
        return True
    if behaviour not in ours.behaviours or behaviour not in theirs.behaviours:
        return True
    k, draws = ours.behaviours.index(behaviour), UserDraws(ours, PART_DRAWS)
    higher = draws.auc(k, theirs.probability[:, theirs.behaviours.index(behaviour)]).draws
    return interval(higher - draws.auc(k, ours.probability[:, k]).draws)[0] > 0


def _training_warnings(model: ReportedModel, prefix: str) -> Iterable[str]:
    training = _dict(model.document.get("training"))
    rows, skipped = _float(training.get("rows")), _float(training.get("skipped_rows")) or 0
    if rows == 0:
        yield f"{prefix}The model was trained on 0 rows."
    rows = rows or 0
    if skipped > _SKIPPED * (rows + skipped):
        yield f"{prefix}{100 * skipped / (rows + skipped):.1f} % of the rows were skipped, because they are corrupt."
    waiting = _float(_dict(training.get("share_of_time")).get("data")) or 0
    if waiting > _WAITING:
        yield f"{prefix}Training waited for data in {100 * waiting:.0f} % of the time: more data.workers help."
    stalls, seconds = training.get("checkpoint_stalls_seconds"), _training_seconds(model.history)
    stalled = sum(_float(stall) or 0 for stall in stalls) if isinstance(stalls, list) else 0
    if seconds and stalled > _STALLED * seconds:
        yield f"{prefix}Checkpoints stopped the training for {100 * stalled / seconds:.0f} % of the time."
    for table, counts in _dict(model.history[-1].get("ids") if model.history else None).items():
        looked_up, unserved = _float(_dict(counts).get("looked_up")), _float(_dict(counts).get("unserved"))
        if looked_up and unserved and unserved > _UNSERVED * looked_up:
            yield f"{prefix}{100 * unserved / looked_up:.0f} % of the look-ups in the table {table} found no row."


def _quality(models: Sequence[ReportedModel]) -> list[ReportSection]:
    """Return the metrics of the held-out range: a table, and AUC beside the other models and the best possible."""
    intervals = [metrics_with_intervals(model.held_out) if model.held_out is not None else {} for model in models]
    names = list(dict.fromkeys(name for model in models for name in model.behaviours))
    if not names:
        return []
    best = any("best_auc" in values for model in models for values in model.behaviours.values())
    header = ["behaviour", *(["model"] if len(models) > 1 else []), "AUC", "GAUC", *(["best AUC"] if best else [])]
    header += ["logloss", "NE", "calibration", "positives", "rows"]
    rows, series = [], []
    for model, spread in zip(models, intervals, strict=True):
        points = [_with_interval(model.behaviours.get(name, {}), spread.get(name, {}), "auc") for name in names]
        series.append(Series(model.name, range(len(names)), points))
    if best:
        own = models[0].behaviours
        series.append(
            Series.of("best possible", range(len(names)), [_float(own.get(name, {}).get("best_auc")) for name in names])
        )
    for name in names:
        for model, spread in zip(models, intervals, strict=True):
            values = model.behaviours.get(name, {})
            cells = [name, *([model.name] if len(models) > 1 else [])]
            cells += [_interval(_with_interval(values, spread.get(name, {}), metric)) for metric in ("auc", "gauc")]
            if best:
                cells.append(precise(_float(values.get("best_auc"))))
            cells += [
                precise(_float(values.get(metric))) for metric in ("logloss", "ne", "calibration", "positives", "rows")
            ]
            rows.append(cells)
    text = f"Brackets are 95 % intervals over users (bootstrap, {DRAWS} draws)." if any(intervals) else ""
    if best:
        text += " The best AUC is that of the true probabilities, which this simulated world knows."
    chart = dot_chart("AUC of the held-out range", "AUC", names, series)
    table = ReportTable("", header, rows, 2 if len(models) > 1 else 1)
    return [ReportSection("Held-out metrics", text.strip(), [table], _charts(chart))]


def _against(directories: Sequence[Path]) -> list[ReportSection]:
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


def _parts(run: StoredRun) -> list[ReportSection]:
    held_out = run.models[0].held_out
    if held_out is None or not len(held_out.visit_id):
        return []
    charts = []
    for part in parts_of(held_out):
        # A part of all rows says nothing that the metrics do not say.
        if len(part.names) > 1:
            chart = line_chart(part.title, "", "AUC", part.series, names=part.names)
            if chart is not None:
                cells = [[*line, f"{rows:,}"] for line, rows in zip(chart.rows, part.rows, strict=True)]
                charts.append(replace(chart, header=[*chart.header, "rows"], rows=cells))
    text = f"The {SHOWN} behaviours with the most positives. Bars are 95 % intervals over users ({PART_DRAWS} draws)."
    return [ReportSection("Where it is good and bad", text, [], charts)] if charts else []


def _metrics(run: StoredRun) -> ReportSection:
    """Return the metrics of a run that is no ranker's, by their names."""
    rows = [[name, precise(value)] for name, value in run.summary.metrics.items()]
    return ReportSection("Metrics", "", [ReportTable("", ["metric", "value"], rows)] if rows else [])


def _curves(models: Sequence[ReportedModel]) -> ReportSection:
    """Return loss and progressive AUC against the rows, and rows against time."""
    losses, times, aucs = [], [], []
    for model in models:
        rows = _cumulated(model.history, "rows")
        places = rows if rows and rows[-1] else [float(entry["step"]) for entry in model.history]
        losses.append(Series.of(model.name, places, [_float(entry.get("loss")) for entry in model.history]))
        minutes = [seconds / 60 for seconds in _seconds(model.history)]
        if minutes and minutes[-1] > 0:
            times.append(Series.of(model.name, minutes, list(rows)))
    own = models[0]
    rows = _cumulated(own.history, "rows")
    for name in _dict(own.history[-1].get("auc")) if own.history else ():
        aucs.append(Series.of(name, rows, [_float(_dict(entry.get("auc")).get(name)) for entry in own.history]))
    by_rows = "rows" if any(_float(entry.get("rows")) for entry in own.history) else "step"
    return ReportSection(
        "Training",
        "",
        [],
        _charts(
            line_chart(
                "Loss of the training steps, sum over the behaviours" if aucs else "Loss", by_rows, "loss", losses
            ),
            line_chart("Progressive AUC: each batch is predicted before it is trained on", "rows", "AUC", aucs),
            line_chart("Rows against time", "minutes of training", "rows", times, zero=True),
        ),
    )


def _calibration(run: StoredRun) -> ReportSection:
    """Return predicted against observed probabilities, with the numbers of rows."""
    curves = _dict(run.models[0].document.get("calibration_curves"))
    series, rows = [], []
    for name, bins in curves.items():
        known = [
            [float(value) for value in entry]
            for entry in (bins if isinstance(bins, list) else ())
            if isinstance(entry, list) and len(entry) == 3 and all(_float(value) is not None for value in entry)
        ]
        series.append(Series.of(name, [entry[0] for entry in known], [entry[1] for entry in known]))
        rows += [[name, precise(p), precise(y), f"{n:,.0f}", f"{y * n:,.0f}"] for p, y, n in known]
    chart = line_chart(
        "Observed share against the mean prediction",
        "mean prediction",
        "observed share",
        series,
        logarithmic=True,
        diagonal=True,
    )
    if chart is None:
        return ReportSection("Calibration")
    chart = Chart(
        chart.title,
        chart.svg,
        chart.legend,
        ["behaviour", "mean prediction", "observed share", "rows", "positives"],
        rows,
    )
    text = (
        "On the thin line a prediction of 10 % comes true in 10 % of the rows. Bins without a positive are not drawn."
    )
    return ReportSection("Calibration", text, [], [chart])


def _speed(models: Sequence[ReportedModel]) -> ReportSection:
    """Return rows per second, and the parts of the time."""
    rates = []
    for model in models:
        rows = _cumulated(model.history, "rows")
        rates.append(Series.of(model.name, rows, [_float(entry.get("rows_per_second")) for entry in model.history]))
    history = models[0].history
    totals = {phase: sum(_float(entry.get(phase)) or 0 for entry in history) for phase in PHASES}
    charts = _charts(
        share_chart("Parts of the time of a step", [(_PHASE_NAMES[phase], totals[phase]) for phase in PHASES]),
        line_chart("Rows per second", "rows", "rows per second", rates, zero=True),
    )
    training = _dict(models[0].document.get("training"))
    stalls = training.get("checkpoint_stalls_seconds")
    text = ""
    if isinstance(stalls, list) and stalls and all(_float(stall) is not None for stall in stalls):
        saves = "1 save of a checkpoint" if len(stalls) == 1 else f"{len(stalls)} saves of checkpoints"
        text = f"{saves} stopped the training for {sum(stalls):.2f} s in all."
    return ReportSection("Throughput", text if charts else "", [], charts)


def _tables(run: StoredRun) -> ReportSection:
    """Return the tables with their placement and size."""
    rows = []
    total = 0.0
    for entry in run.models[0].plan:
        size, dim = _float(entry.get("rows")), _float(entry.get("dim"))
        if size is None or dim is None:
            continue
        total += 4 * size * dim
        ranks = entry.get("ranks")
        rows.append(
            [
                str(entry.get("table")),
                f"{size:,.0f}",
                f"{dim:,.0f}",
                size_text(round(4 * size * dim)),
                str(entry.get("sharding")),
                str(entry.get("kernel")),
                ", ".join(map(str, ranks)) if isinstance(ranks, list) else "",
            ]
        )
    text = f"All weights have {size_text(round(total))} in float32; the optimizer's state comes to it." if rows else ""
    header = ["table", "rows", "dim", "weights", "sharding", "kernel", "ranks"]
    return ReportSection("Embedding tables", text, [ReportTable("", header, rows)] if rows else [])


def _stream(run: StoredRun) -> ReportSection:
    """Return counts, freshness and lag of a stream."""
    stream = _dict(run.models[0].document.get("stream"))
    counts = [[name.replace("_", " "), precise(_float(value))] for name, value in _dict(stream.get("counts")).items()]
    fresh = [
        [name.replace("_", " "), precise(_float(value))]
        for name, value in _dict(stream.get("freshness_seconds")).items()
        if _float(value) is not None
    ]
    tables = [ReportTable("Events", ["count of", "number"], counts)] if counts else []
    tables += [ReportTable("Freshness", ["quantile", "seconds"], fresh)] if fresh else []
    history = run.models[0].history
    lags = [_float(entry.get("lag_seconds")) for entry in history]
    chart = line_chart(
        "Lag behind the source", "rows", "seconds", [Series.of("lag", _cumulated(history, "rows"), lags)]
    )
    return ReportSection("Stream", "", tables, _charts(chart))


def _environment(run: StoredRun) -> list[tuple[str, str]]:
    """Return versions and machine of the last start, and the command: name and value."""
    if not run.starts:
        return []
    last = run.starts[-1]
    command = last.get("command")
    dataset = _dict(last.get("dataset"))
    packages = _dict(last.get("packages"))
    entries = [
        ("starts", f"{len(run.starts):,}"),
        ("first start", str(run.starts[0].get("started", ""))),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else ""),
        ("host", str(last.get("host", ""))),
        ("platform", str(last.get("platform", ""))),
        ("accelerator", str(last.get("accelerator", ""))),
        ("threads of a rank", _whole(last.get("threads"))),
        ("dataset", str(dataset.get("path", ""))),
        ("dataset fingerprint", str(dataset.get("fingerprint", ""))),
        ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
    ]
    return [(name, value) for name, value in entries if value]


def _with_interval(values: Mapping[str, Any], spread: Mapping[str, Point | None], metric: str) -> Point | None:
    """Return a metric of all rows with the interval of the rows that are kept."""
    value, kept = _float(values.get(metric)), spread.get(metric)
    if value is None:
        return None
    return Point(value) if kept is None else Point(value, kept.low, kept.high)


def _interval(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point.value:.4f}" + ("" if point.low is None else f" ({point.low:.4f}, {point.high:.4f})")


def _charts(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _cumulated(history: Sequence[Entry], key: str) -> list[float]:
    """Return the sums of a key up to each entry."""
    sums, total = [], 0.0
    for entry in history:
        total += _float(entry.get(key)) or 0.0
        sums.append(total)
    return sums


def _seconds(history: Sequence[Entry]) -> list[float]:
    """Return the seconds of training up to each entry."""
    sums, total = [], 0.0
    for entry in history:
        rows, rate = _float(entry.get("rows")) or 0.0, _float(entry.get("rows_per_second")) or 0.0
        total += rows / rate if rate else _float(entry.get("seconds")) or 0.0
        sums.append(total)
    return sums


def _training_seconds(history: Sequence[Entry]) -> float:
    return (_seconds(history) or [0.0])[-1]


def _float(value: object) -> float | None:
    """Return a number; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _whole(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
