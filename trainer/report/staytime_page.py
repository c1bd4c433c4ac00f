"""The page about a staytime run: errors and orders beside constants and the truth, calibration, its fitted base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError, one_line
from trainer.report.charts import Chart, Series, line_chart, precise
from trainer.report.page_parts import JobPage, ReportSection, ReportTable, drawn, values_table
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, numbers, whole
from trainer.report.user_means import UserMeans
from trainer.runtime.stored_files import open_regular, read_json_object

PREDICTIONS, FITTED = "predictions.parquet", "fitted.json"

ERRORS = {
    "rmse": "RMSE (s)",
    "mae": "MAE (s)",
    "rmse_opened": "RMSE opened (s)",
    "mae_opened": "MAE opened (s)",
    "bias": "bias",
}
ORDERS = {
    **{"xauc": "XAUC", "gauc": "GAUC", "uauc": "UAUC"},
    **{f"ndcg@{k}": f"NDCG@{k}" for k in (1, 3, 5)},
    "mrr": "MRR",
    **{f"wt@{k}": f"WT@{k} (s)" for k in (1, 3, 5)},
}

BINS = 10
"""Groups of equally many rows in the chart of calibration."""

UNBIASED = (0.8, 1.25)
"""Range of the bias without a warning."""

SMALL = 30
"""Opened rows below which the metrics of opened rows are mostly chance."""


@dataclass(frozen=True)
class StayedRows:
    """Rows of ``predictions.parquet``.

    Attributes:
        user_id: ``[n]`` int64.
        seconds, predicted: ``[n]`` float64, true and predicted stays.
    """

    user_id: np.ndarray
    seconds: np.ndarray
    predicted: np.ndarray

    @staticmethod
    def read(directory: Path) -> StayedRows:
        """Read the predictions of a run.

        Raises:
            FileNotFoundError: there are none.
            UserError: the file is damaged.
        """
        file = directory / PREDICTIONS
        try:
            with open_regular(file) as opened:
                table = pq.read_table(opened, columns=["user_id", "seconds", "predicted"])
            return StayedRows(
                table["user_id"].to_numpy().astype(np.int64),
                table["seconds"].to_numpy().astype(np.float64),
                table["predicted"].to_numpy().astype(np.float64),
            )
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{file}: damaged, or not written by this version ({one_line(error):.120})") from None


def staytime_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about a staytime run."""
    document, base = run.models[0].document, mapping(run.config.get("base"))
    lcu = mapping(run.config.get("lcu"))
    seconds = number(document.get("train_seconds"))
    whole_range = mapping(document.get("all"))
    tiles = [
        ("base loss", str(base.get("loss") or "")),
        ("backbone", str(base.get("backbone") or "")),
        ("LCU", ("on, " + str(lcu.get("mode")) if lcu.get("enabled") else "off") if lcu else ""),
        ("parameters", whole(document.get("parameters"))),
        ("time of training", f"{seconds:,.1f} s" if seconds is not None else ""),
        ("held-out visits", whole(whole_range.get("rows"))),
        ("of them opened", whole(whole_range.get("opened"))),
    ]
    return JobPage(
        tiles,
        list(_warnings(document)),
        [
            _errors(document),
            _calibration(run),
            _exposures(document),
            _comments(document),
            _losses(document),
            _base(run),
        ],
    )


def _errors(document: Mapping[str, Any]) -> ReportSection:
    """Return the metrics of all held-out visits beside constant predictions and the true expectation."""
    lines = {"model": document.get("all")}
    lines |= {f"constant: {name}": values for name, values in mapping(document.get("constant")).items()}
    if "truth" in document:
        lines["true expectation"] = document["truth"]
    orders = {name: values for name, values in lines.items() if not name.startswith("constant")}
    if "released_definitions" in document:
        orders["model, definitions of LCU's released code"] = document["released_definitions"]
    text = "The bias is the mean prediction divided by the mean stay."
    if "truth" in document:
        text += " The true expectation is known in this simulated world: no model can do better on average."
    return ReportSection(
        "Held-out metrics",
        text,
        [*values_table("Seconds", "", lines, ERRORS), *values_table("Order", "", orders, ORDERS)],
    )


def _calibration(run: StoredRun) -> ReportSection:
    """Return mean stays against mean predictions, in groups of equally many rows."""
    title = "Calibration"
    try:
        rows = StayedRows.read(run.directory)
    except FileNotFoundError:
        run.notes.append(f"{PREDICTIONS} is not there: there is no calibration.")
        return ReportSection(title)
    except UserError as error:
        run.notes.append(str(error))
        return ReportSection(title)
    finite = np.isfinite(rows.predicted) & np.isfinite(rows.seconds)
    if not finite.any():
        return ReportSection(title)
    edges = np.unique(np.quantile(rows.predicted[finite], np.linspace(0, 1, BINS + 1)[1:-1]))
    group = np.searchsorted(edges, rows.predicted, side="right")
    means = UserMeans(rows.user_id)
    present = [number for number in range(len(edges) + 1) if (finite & (group == number)).any()]
    masks = [finite & (group == number) for number in present]
    points = [means.of(rows.seconds, mask) for mask in masks]
    places = [float(rows.predicted[mask].mean()) for mask in masks]
    chart = line_chart(
        "Mean stay against the mean prediction",
        "mean prediction (s)",
        "mean stay (s)",
        [Series("stay", places, points)],
        diagonal=True,
    )
    if chart is None:
        return ReportSection(title)
    header = [*chart.header, "rows", "opened"]
    cells = [
        [*line, f"{int(mask.sum()):,}", f"{int((rows.seconds[mask] > 0).sum()):,}"]
        for line, mask in zip(chart.rows, masks, strict=True)
    ]
    text = (
        "Held-out visits in groups of equally many, by their predicted seconds. On the thin line predictions are right "
        "on average. Bars are 95 % intervals over users."
    )
    return ReportSection(title, text, [], [Chart(chart.title, chart.svg, chart.legend, header, cells)])


def _exposures(document: Mapping[str, Any]) -> ReportSection:
    """Return the metrics by the number of training visits to the video."""
    groups = {name: mapping(values) for name, values in mapping(document.get("exposures")).items()}
    names = list(groups)
    charts = [
        line_chart(
            f"{label} by training visits to the video",
            "training visits to the video",
            label,
            [Series.of(label, range(len(names)), [number(values.get(key)) for values in groups.values()])],
            names=names,
        )
        for key, label in (("gauc", "GAUC"), ("rmse", "RMSE (s)"))
    ]
    columns = {**ERRORS, "xauc": "XAUC", "gauc": "GAUC", "rows": "rows", "opened": "opened"}
    tables = values_table("", "training visits", groups, columns)
    return ReportSection("New and known videos", "", tables, drawn(*charts))


def _comments(document: Mapping[str, Any]) -> ReportSection:
    """Return the metrics of the heads that rank comments."""
    found = mapping(document.get("comments"))
    share = number(found.get("share_touched"))
    heads = {"popularity": found.get("popular"), "interaction": found.get("touched")}
    text = "" if share is None else f"{100 * share:.0f} % of the touched comments are among those of their row."
    columns = {"auc": "AUC", "rows": "rows"}
    return ReportSection("Heads that rank comments", text, values_table("", "head", heads, columns) if found else [])


def _losses(document: Mapping[str, Any]) -> ReportSection:
    """Return the losses of the epochs."""
    stored = document.get("losses")
    epochs = [entry for entry in (stored if isinstance(stored, list) else ()) if isinstance(entry, dict)]
    names = list(dict.fromkeys(name for entry in epochs for name in entry))
    places = [float(place) for place in range(1, len(epochs) + 1)]
    series = [Series.of(name, places, [number(entry.get(name)) for entry in epochs]) for name in names]
    chart = line_chart("Loss of the epochs", "epoch", "loss", series)
    return ReportSection("Training", "", [], drawn(chart))


def _base(run: StoredRun) -> ReportSection:
    """Return the values that the base loss has fitted on the training range."""
    try:
        fitted = read_json_object(run.directory / FITTED)
    except FileNotFoundError:
        return ReportSection("Base")
    except (OSError, UserError) as error:
        run.notes.append(one_line(error))
        return ReportSection("Base")
    facts = mapping(fitted.get("base"))
    name = str(mapping(run.config.get("base")).get("loss") or "base")
    values = [
        [key.replace("_", " "), precise(number(value))] for key, value in facts.items() if number(value) is not None
    ]
    values += [
        [key.replace("_", " "), precise(number(fitted.get(key)))]
        for key in ("training_visits", "opened_in_training", "comments_with_id")
        if number(fitted.get(key)) is not None
    ]
    tables = [ReportTable("Fitted on the training range", ["value of", "number"], values)] if values else []
    lists = {key: numbers(value) for key, value in facts.items() if isinstance(value, list)}
    if known := {key: found for key, found in lists.items() if any(value is not None for value in found)}:
        longest = max(map(len, known.values()))
        tables.append(
            ReportTable(
                "Fitted by group",
                ["group", *(key.replace("_", " ") for key in known)],
                [
                    [str(place + 1), *(precise(found[place]) if place < len(found) else "" for found in known.values())]
                    for place in range(longest)
                ],
            )
        )
    stored = fitted.get("fields")
    fields = [field for field in (stored if isinstance(stored, list) else ()) if isinstance(field, str)]
    text = f"The base loss is {name}." + (f" Inputs: {', '.join(fields)}." if fields else "")
    return ReportSection("Base", text, tables)


def _warnings(document: Mapping[str, Any]) -> Iterator[str]:
    found = mapping(document.get("all"))
    bias, opened = number(found.get("bias")), number(found.get("opened"))
    if bias is not None and not UNBIASED[0] <= bias <= UNBIASED[1]:
        yield f"The mean prediction is {bias:.2f} times the mean stay."
    if opened is not None and opened < SMALL:
        yield f"{opened:,.0f} held-out visits have opened comments: metrics of opened visits are mostly chance."
    rmse = number(found.get("rmse"))
    for name, values in mapping(document.get("constant")).items():
        other = number(mapping(values).get("rmse"))
        if rmse is not None and other is not None and other < rmse:
            yield f"The constant prediction ({name}) has a smaller RMSE: {other:.4f} s, {rmse:.4f} s here."
