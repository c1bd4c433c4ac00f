"""The page about an alignment: Recall@K with intervals beside a random order, the gate by popularity, loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError, one_line
from trainer.report.charts import Point, Series, line_chart, precise
from trainer.report.page_parts import JobPage, ReportSection, ReportTable, drawn
from trainer.report.stored_run import StoredRun
from trainer.report.stored_values import mapping, number, whole
from trainer.report.user_means import UserMeans
from trainer.runtime.stored_files import open_regular
from trainer.semantic_ids.align_evaluation import HELD_OUT

ALL = "all"
RECALL = "recall@"

FEW_PAIRS = 100
"""Pairs of a group below which its metrics are mostly chance."""


@dataclass(frozen=True)
class RankedPairs:
    """Outcomes of held-out pairs; trainer/semantic_ids/align_evaluation.py describes the columns.

    Attributes:
        user_id: ``[n]`` int64.
        larger, equal, on_air: ``[n]`` float64, numbers of authors.
    """

    user_id: np.ndarray
    larger: np.ndarray
    equal: np.ndarray
    on_air: np.ndarray

    @staticmethod
    def read(directory: Path) -> RankedPairs:
        """Read the outcomes of a run.

        Raises:
            FileNotFoundError: there are none.
            UserError: the file is damaged, or of an earlier version.
        """
        file = directory / HELD_OUT
        names = ("user_id", "larger", "equal", "on_air")
        try:
            with open_regular(file) as opened:
                table = pq.read_table(opened, columns=list(names))
            user, *others = (table[name].to_numpy() for name in names)
            return RankedPairs(user.astype(np.int64), *(column.astype(np.float64) for column in others))
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{file}: damaged, or not written by this version ({one_line(error):.120})") from None

    def recall(self, k: int) -> np.ndarray:
        """Return the share of the orders of equal authors in which the author is among the first ``k``, ``[n]``."""
        return np.clip((k - self.larger) / np.maximum(self.equal, 1), 0, 1)

    def by_chance(self, k: int) -> float:
        """Return the recall of a random order of the authors on air."""
        return float(np.minimum(k / np.maximum(self.on_air, 1), 1).mean())


def align_page(run: StoredRun) -> JobPage:
    """Return the parts of a page about an alignment."""
    document = run.models[0].document
    retrieval = mapping(document.get("retrieval"))
    every = mapping(retrieval.get(ALL))
    positives = document.get("positives")
    on_air = number(every.get("on_air"))
    gate = number(every.get("gate"))
    tiles = [
        ("positives", ", ".join(map(str, positives)) if isinstance(positives, list) else ""),
        ("held-out pairs", whole(every.get("pairs"))),
        ("authors of them", whole(every.get("authors"))),
        ("authors on air, mean", f"{on_air:,.1f}" if on_air is not None else ""),
        ("mean gate", f"{gate:.3f}" if gate is not None else ""),
    ]
    return JobPage(tiles, list(_warnings(retrieval)), [_retrieval(run, retrieval), _gate(retrieval)])


def _retrieval(run: StoredRun, retrieval: Mapping[str, Any]) -> ReportSection:
    """Return recall and reciprocal rank by popularity of the author."""
    groups = {name: mapping(values) for name, values in retrieval.items() if isinstance(values, dict)}
    recalls = [name for name in mapping(retrieval.get(ALL)) if name.startswith(RECALL) and _k(name) is not None]
    pairs = _pairs(run)
    chance, spread = {}, {}
    if pairs is not None:
        means = UserMeans(pairs.user_id)
        for name in recalls:
            k = _k(name) or 0
            chance[name], spread[name] = pairs.by_chance(k), means.of(pairs.recall(k))
    rows = []
    for group, values in groups.items():
        cells = [
            _with(number(values.get(name)), spread.get(name) if group == ALL else None) for name in (*recalls, "mrr")
        ]
        counts = [precise(number(values.get(key))) for key in ("pairs", "authors", "on_air")]
        rows.append([group, *cells, *counts])
    if chance:
        rows.append(["random order, all", *(f"{chance[name]:.4f}" for name in recalls), "", "", "", ""])
    names = list(groups)
    series = [
        Series.of(name.replace(RECALL, "Recall@"), range(len(names)), [number(v.get(name)) for v in groups.values()])
        for name in recalls
    ]
    text = "The author of a held-out positive is looked for among the authors on air at the request."
    if spread:
        text += " Brackets are 95 % intervals over users (bootstrap)."
    header = ["author", *(name.replace(RECALL, "Recall@") for name in recalls), "MRR", "pairs", "authors", "on air"]
    chart = line_chart("Recall by popularity of the author", "", "recall", series, names=_short(names), zero=True)
    return ReportSection("Retrieval", text, [ReportTable("", header, rows)] if rows else [], drawn(chart))


def _gate(retrieval: Mapping[str, Any]) -> ReportSection:
    """Return the gate of the authors' tower by popularity."""
    groups = {name: mapping(values) for name, values in retrieval.items() if isinstance(values, dict)}
    names = list(groups)
    series = [Series.of("gate", range(len(names)), [number(values.get("gate")) for values in groups.values()])]
    chart = line_chart("Mean gate of the authors on air", "", "gate", series, names=_short(names), zero=True)
    text = "The gate is the weight of what an author shows against the features with the id; an unseen author has 1."
    return ReportSection("Gate", text, [], drawn(chart))


def _pairs(run: StoredRun) -> RankedPairs | None:
    """Return the stored outcomes; None with a note if there are none."""
    try:
        found = RankedPairs.read(run.directory)
    except FileNotFoundError:
        if run.models[0].document.get("retrieval"):
            run.notes.append("The run has kept no outcomes of its pairs: there are no intervals.")
        return None
    except UserError as error:
        run.notes.append(str(error))
        return None
    return found if len(found.user_id) else None


def _with(value: float | None, point: Point | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" + ("" if point is None or point.low is None else f" ({point.low:.4f}, {point.high:.4f})")


def _k(name: str) -> int | None:
    """Return the number of a name such as ``recall@10``."""
    digits = name[len(RECALL) :]
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _short(names: list[str]) -> list[str]:
    """Return names that fit below a chart: without the word that all quarters have."""
    return [name.replace(" quarter", "").replace("most popular", "popular") for name in names]


def _warnings(retrieval: Mapping[str, Any]) -> Iterator[str]:
    for name, values in retrieval.items():
        pairs = number(mapping(values).get("pairs"))
        if pairs is not None and pairs < FEW_PAIRS:
            yield f"{name}: {pairs:,.0f} held-out pairs: its metrics are mostly chance."
