"""Sums of a fine-tuning run over a resume."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from trainer.llm.finetuning import training_state
from trainer.llm.finetuning.training_state import LossWindow


def test_a_window_goes_on_where_it_was_saved_and_the_time_between_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training_state, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    window = LossWindow()
    window.add(3.0, answer_tokens=4, tokens=10, places=16)
    clock.now = 107.0
    saved = json.loads(json.dumps(window.state_dict()))
    clock.now = 1000.0
    resumed = LossWindow()
    resumed.load_state_dict(saved)
    clock.now = 1003.0
    resumed.add(2.0, answer_tokens=1, tokens=5, places=8)
    assert resumed.entry(7, 0.5) == {
        "step": 7,
        "loss": 1.0,
        "learning_rate": 0.5,
        "tokens": 15,
        "answer_tokens": 5,
        "padding_share": pytest.approx(9 / 24),
        "seconds": 10.0,
        "tokens_per_second": 1.5,
    }
