"""Metrics table of a run."""

from __future__ import annotations

from trainer.ranking.metrics_table import metrics_table

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
