"""Sums of a ranker's training over a resume."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.ranking import training_state
from trainer.ranking.training_state import PHASES, MetricWindow


def step(loss: float, alignment: float, rows: int, skipped: int, seconds: float) -> Any:
    return SimpleNamespace(
        values=SimpleNamespace(loss=loss, alignment=alignment),
        rows_global=rows,
        batch=SimpleNamespace(skipped_rows=skipped),
        seconds=dict.fromkeys(PHASES, seconds),
    )


def test_a_window_goes_on_where_it_was_saved_and_the_time_between_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training_state, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    window = MetricWindow()
    window.add(step(3.0, 1.0, rows=30, skipped=2, seconds=0.5))
    clock.now = 107.0
    saved = json.loads(json.dumps(window.state_dict()))
    clock.now = 1000.0
    resumed = MetricWindow()
    resumed.load_state_dict(saved)
    clock.now = 1003.0
    resumed.add(step(1.0, 2.0, rows=10, skipped=1, seconds=0.25))
    assert resumed.rows == 40
    assert resumed.entry(7, {"all": {"auc": 0.7, "gauc": 0.6}}, {}) == {
        "step": 7,
        "loss": 2.5,
        "alignment": 1.25,
        "rows": 40,
        "skipped_rows": 3,
        "rows_per_second": 4.0,
        "auc": {"all": 0.7},
        "gauc": {"all": 0.6},
        "ids": {},
        **dict.fromkeys(PHASES, 0.75),
    }
