"""Learning rate factors over a run."""

from __future__ import annotations

import pytest

from trainer.engine.lr_schedule import learning_rate_factor


def test_warm_up_then_each_decay() -> None:
    rise = [learning_rate_factor(step, 100, 0.1, "constant") for step in range(12)]
    assert rise == pytest.approx([0.1 * (step + 1) for step in range(10)] + [1.0, 1.0])
    assert learning_rate_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(77.5, 100, 0.1, "linear") == pytest.approx(0.25)
    assert learning_rate_factor(77.5, 100, 0.1, "cosine") == pytest.approx((1 - 0.5**0.5) / 2)
    assert learning_rate_factor(10, 100, 0.1, "cosine") == 1.0
    for decay in ("linear", "cosine"):
        assert learning_rate_factor(100, 100, 0.0, decay) == pytest.approx(0.0, abs=1e-12)
        assert learning_rate_factor(250, 100, 0.0, decay) == pytest.approx(0.0, abs=1e-12)


def test_a_single_step_has_a_rate() -> None:
    assert learning_rate_factor(0, 1, 0.5, "cosine") == 1.0
    assert learning_rate_factor(0, 1, 0.0, "linear") == 1.0


def test_steps_need_not_be_whole() -> None:
    factors = [learning_rate_factor(done / 7, 100 / 7, 0.3, "cosine") for done in range(101)]
    top = factors.index(1.0)
    assert factors[:top] == sorted(factors[:top]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
