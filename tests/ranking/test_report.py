"""Metrics table and report of a run."""

from __future__ import annotations

from pathlib import Path

from trainer.ranking.report import metrics_table, write_report
from trainer.runtime.phase_timer import PHASES

METRICS = {"auc": 0.71234, "gauc": None, "uauc": 0.6, "logloss": 0.5, "ne": 0.9, "calibration": 1.01, "positives": 1234}


def test_undefined_is_a_dash_and_models_share_a_table() -> None:
    report = {"click": {**METRICS, "rows": 99}, "like": {**METRICS, "rows": 99}}
    alone = metrics_table({"ple": report}).splitlines()
    assert alone[0].split() == ["behaviour", "auc", "gauc", "uauc", "logloss", "ne", "calibration", "positives", "rows"]
    assert alone[1].split() == ["click", "0.7123", "-", "0.6000", "0.5000", "0.9000", "1.0100", "1,234", "99"]
    both = metrics_table({"ple": report, "mmoe": {"click": {**METRICS, "best_auc": 0.8}, "like": METRICS}}).splitlines()
    assert [line.split()[:2] for line in both[1:]] == [
        ["click", "ple"],
        ["click", "mmoe"],
        ["like", "ple"],
        ["like", "mmoe"],
    ]
    assert both[0].split()[-1] == "best_auc"
    assert len({len(line) for line in both}) == 1


def test_the_report_is_one_file_with_its_pictures(tmp_path: Path) -> None:
    entry = {"loss": 0.5, "rows_per_second": 100.0, "auc": {"click": 0.6}, **dict.fromkeys(PHASES, 1.0)}
    write_report(
        tmp_path / "report.html",
        title="a <run>",
        config={"data": {"path": "d"}},
        models={"ple": {"click": {**METRICS, "rows": 99}}},
        history=[{"step": step, **entry} for step in (1, 2)],
        plan=[{"table": "user", "sharding": "row_wise"}],
        calibration={"click": [(0.1, 0.2, 10), (0.3, 0.25, 10)]},
    )
    text = (tmp_path / "report.html").read_text()
    assert "a &lt;run&gt;" in text and "0 rows" not in text
    assert text.count("data:image/svg+xml;base64,") == 4
    assert "http" not in text.replace("http-equiv", "")
    assert "row_wise" in text and "0.7123" in text


def test_a_report_without_rows_or_metrics_is_still_one(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", title="empty", config={}, models={}, history=[], plan=[], calibration={})
    text = (tmp_path / "report.html").read_text()
    assert "The job has no held-out range." in text and "The model was trained on 0 rows." in text
