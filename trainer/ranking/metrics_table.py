"""The metrics table of a run, as text."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.console.text_table import text_table

COLUMNS = ("auc", "gauc", "uauc", "logloss", "ne", "calibration", "positives", "rows")
"""Metrics of the table, in order; ``best_auc`` follows if the true probabilities are known."""


Metrics = Mapping[str, Mapping[str, float | int | None]]
"""Behaviour -> metric -> value, ``None`` if undefined."""


def metrics_table(models: Mapping[str, Metrics]) -> str:
    """Format the metrics of one model or several: a line per behaviour and model, ``-`` if undefined."""
    behaviours = list(next(iter(models.values())))
    columns = [*COLUMNS]
    if any("best_auc" in metrics[behaviour] for metrics in models.values() for behaviour in metrics):
        columns += ["best_auc"]
    header = ["behaviour", *(["model"] if len(models) > 1 else []), *columns]
    lines = []
    for behaviour in behaviours:
        for name, metrics in models.items():
            values = metrics[behaviour]
            label = [behaviour, name] if len(models) > 1 else [behaviour]
            lines.append([*label, *(_cell(values.get(column)) for column in columns)])
    return text_table(header, lines, texts=2 if len(models) > 1 else 1)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
