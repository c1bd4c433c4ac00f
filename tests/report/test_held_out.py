"""Metrics of kept rows: intervals and parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.stored_runs import ROWS, held_out_rows, write_rows
from trainer.console.errors import UserError
from trainer.metrics.behaviour_metrics import auc, grouped_auc
from trainer.report.held_out import HeldOutRows, metrics_with_intervals, parts_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> HeldOutRows:
    directory = tmp_path_factory.mktemp("rows")
    columns = held_out_rows(0.1)
    columns["mask_gift"][::3] = 0
    write_rows(directory, columns)
    return HeldOutRows.read(directory)


def test_intervals_lie_around_the_exact_metrics(rows: HeldOutRows) -> None:
    found = metrics_with_intervals(rows)
    for k, name in enumerate(rows.behaviours):
        kept = rows.mask[:, k] > 0
        scores, labels = rows.probability[kept, k], rows.label[kept, k]
        for metric, value in (
            ("auc", auc(scores, labels)),
            ("gauc", grouped_auc(rows.user_id[kept], scores, labels)),
        ):
            point = found[name][metric]
            assert point is not None and point.low is not None and point.high is not None
            assert point.value == pytest.approx(value, abs=1e-12)
            assert 0.005 < point.high - point.low < 0.5 and point.low < point.value < point.high
    best = found["click"]["best_auc"]
    assert best is not None and found["click"]["auc"] is not None and best.value > found["click"]["auc"].value


def test_parts_have_the_auc_of_their_rows(rows: HeldOutRows) -> None:
    activity, popularity, hours = parts_of(rows)
    assert (activity.names[-1], popularity.names[-1]) == ("100–999", "10–99")
    assert [len(part.series) for part in (activity, hours)] == [2, 1] and hours.title.endswith(", click")
    assert hours.names == [str(hour) for hour in range(24)] and sum(hours.rows) == len(rows.visit_id)
    part = np.flatnonzero((rows.earlier["user"] >= 10) & (rows.earlier["user"] < 100))
    (click,) = (series for series in activity.series if series.name == "click")
    point = click.points[activity.names.index("10–99")]
    assert point is not None and point.value == pytest.approx(auc(rows.probability[part, 0], rows.label[part, 0]))
    # 00:00 UTC is 8 o'clock in Shanghai.
    assert rows.hours()[0] == 8 and rows.hours()[24] == 9


def test_a_class_that_is_absent_has_no_metric(rows: HeldOutRows) -> None:
    negative = rows.take(np.flatnonzero(rows.label[:, 0] == 0))
    assert metrics_with_intervals(negative)["click"] == {"auc": None, "gauc": None, "best_auc": None}
    empty = rows.take(np.zeros(0, np.int64))
    assert metrics_with_intervals(empty)["gift"]["auc"] is None
    clicks = [series for part in parts_of(negative) for series in part.series if series.name == "click"]
    assert clicks and all(point is None for series in clicks for point in series.points)


@pytest.mark.parametrize("change", ["text", "no file", "other columns", "a column less", "texts"])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, change: str) -> None:
    columns = held_out_rows(0.1)
    if change == "no file":
        with pytest.raises(FileNotFoundError):
            HeldOutRows.read(tmp_path)
        return
    if change == "text":
        (tmp_path / "held_out.parquet").write_text("no Parquet")
    elif change == "other columns":
        pq.write_table(pa.table({"user_id": [1]}), tmp_path / "held_out.parquet")
    elif change == "texts":
        pq.write_table(pa.table(columns | {"p_click": ["a"] * ROWS}), tmp_path / "held_out.parquet")
    else:
        del columns["mask_click"]
        pq.write_table(pa.table(columns), tmp_path / "held_out.parquet")
    with pytest.raises(UserError, match=r"held_out\.parquet"):
        HeldOutRows.read(tmp_path)
