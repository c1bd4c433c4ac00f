"""Sections about the training of any job: curves, throughput and embedding tables."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.console.text_table import size_text
from trainer.report.charts import Series, line_chart, share_chart
from trainer.report.metric_history import cumulated, seconds_until
from trainer.report.page_parts import ReportSection, ReportTable, drawn
from trainer.report.stored_run import ReportedModel, StoredRun
from trainer.report.stored_values import mapping, number
from trainer.runtime.phase_timer import PHASES

_PHASE_NAMES = {
    "data": "waiting for data",
    "tables": "tables",
    "dense": "network",
    "communication": "waiting for other ranks",
}


def training_curves(models: Sequence[ReportedModel]) -> ReportSection:
    """Return loss and progressive AUC against the rows, and rows against time."""
    losses, times, aucs = [], [], []
    for model in models:
        rows = cumulated(model.history, "rows")
        places = rows if rows and rows[-1] else [float(entry["step"]) for entry in model.history]
        losses.append(Series.of(model.name, places, [number(entry.get("loss")) for entry in model.history]))
        minutes = [seconds / 60 for seconds in seconds_until(model.history)]
        if minutes and minutes[-1] > 0:
            times.append(Series.of(model.name, [0.0, *minutes], [0.0, *rows]))
    own = models[0]
    rows = cumulated(own.history, "rows")
    for name in mapping(own.history[-1].get("auc")) if own.history else ():
        aucs.append(Series.of(name, rows, [number(mapping(entry.get("auc")).get(name)) for entry in own.history]))
    by_rows = "rows" if any(number(entry.get("rows")) for entry in own.history) else "step"
    return ReportSection(
        "Training",
        "",
        [],
        drawn(
            line_chart(
                "Loss of the training steps, sum over the behaviours" if aucs else "Loss", by_rows, "loss", losses
            ),
            line_chart("Progressive AUC: each batch is predicted before it is trained on", "rows", "AUC", aucs),
            line_chart("Rows against time", "minutes of training", "rows", times, zero=True),
        ),
    )


def throughput(models: Sequence[ReportedModel]) -> ReportSection:
    """Return rows per second, and the parts of the time."""
    rates = []
    for model in models:
        rows = cumulated(model.history, "rows")
        rates.append(Series.of(model.name, rows, [number(entry.get("rows_per_second")) for entry in model.history]))
    history = models[0].history
    totals = {phase: sum(number(entry.get(phase)) or 0 for entry in history) for phase in PHASES}
    charts = drawn(
        share_chart("Parts of the time of a step", [(_PHASE_NAMES[phase], totals[phase]) for phase in PHASES]),
        line_chart("Rows per second", "rows", "rows per second", rates, zero=True),
    )
    training = mapping(models[0].document.get("training"))
    stalls = training.get("checkpoint_stalls_seconds")
    text = ""
    if isinstance(stalls, list) and stalls and all(number(stall) is not None for stall in stalls):
        saves = "1 save of a checkpoint" if len(stalls) == 1 else f"{len(stalls)} saves of checkpoints"
        text = f"{saves} stopped the training for {sum(stalls):.2f} s in all."
    return ReportSection("Throughput", text if charts else "", [], charts)


def embedding_tables(run: StoredRun) -> ReportSection:
    """Return the tables with their placement and size."""
    rows = []
    total = 0.0
    for entry in run.models[0].plan:
        size, dim = number(entry.get("rows")), number(entry.get("dim"))
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
    text = f"All weights have {size_text(round(total))} in float32, without the optimizer's state." if rows else ""
    header = ["table", "rows", "dim", "weights", "sharding", "kernel", "ranks"]
    return ReportSection("Embedding tables", text, [ReportTable("", header, rows)] if rows else [])
