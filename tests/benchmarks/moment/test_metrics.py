"""Time to react on curves made by hand; calibration against what it is by definition."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.moment.metrics import (
    STEP_S,
    WINDOW_S,
    Jump,
    excess_loss,
    expected_calibration_error,
    quality,
    running_mean,
    time_to_react,
)

TIME_S = np.arange(0.0, 1200.0, 0.5)
RISE = Jump(at_s=600.0, until_s=1200.0, before=0.1, after=0.5)
FALL = Jump(at_s=600.0, until_s=1200.0, before=0.5, after=0.1)


def ramp(jump: Jump, delay_s: float, length_s: float, bias: float = 0.0) -> np.ndarray:
    """From one level to the other in a line that begins ``delay_s`` after the jump."""
    done = np.clip((TIME_S - jump.at_s - delay_s) / length_s, 0, 1)
    return jump.before + (jump.after - jump.before) * done + bias


@pytest.mark.parametrize("jump", [RISE, FALL])
@pytest.mark.parametrize(("delay_s", "length_s"), [(0, 200), (100, 100), (300, 40)])
@pytest.mark.parametrize("bias", [-0.05, 0.0, 0.2])
def test_half_of_a_line_is_reached_in_its_middle_whatever_the_bias(
    jump: Jump, delay_s: float, length_s: float, bias: float
) -> None:
    found = time_to_react(jump, TIME_S, ramp(jump, delay_s, length_s, bias))
    assert found == pytest.approx(delay_s + length_s / 2, abs=STEP_S)


@pytest.mark.parametrize("jump", [RISE, FALL])
def test_a_step_at_the_jump_takes_no_time(jump: Jump) -> None:
    assert time_to_react(jump, TIME_S, np.where(jump.at_s > TIME_S, jump.before, jump.after)) <= STEP_S


@pytest.mark.parametrize("jump", [RISE, FALL])
def test_what_does_not_move_or_moves_the_wrong_way_never_reacts(jump: Jump) -> None:
    assert time_to_react(jump, TIME_S, np.full(len(TIME_S), jump.before)) == np.inf
    away = 2 * jump.before - ramp(jump, 10, 10)
    assert time_to_react(jump, TIME_S, away) == np.inf
    # Less than half of the way.
    assert time_to_react(jump, TIME_S, jump.before + 0.45 * (ramp(jump, 10, 10) - jump.before)) == np.inf


def test_what_comes_behind_the_next_jump_does_not_count() -> None:
    early = Jump(at_s=600.0, until_s=700.0, before=0.1, after=0.5)
    assert time_to_react(early, TIME_S, ramp(early, 120, 10)) == np.inf
    assert time_to_react(early, TIME_S, ramp(early, 50, 10)) == pytest.approx(55, abs=STEP_S)


def test_a_jump_without_exposures_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no exposures in the 60"):
        time_to_react(RISE, TIME_S[TIME_S > 600], ramp(RISE, 10, 10)[TIME_S > 600])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_running_mean_is_that_of_the_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time_s, value = np.sort(rng.uniform(0, 100, 50)), rng.random(50)
    at_s = rng.uniform(-50, 150, 40)
    found = running_mean(time_s, value, at_s, WINDOW_S)
    for moment, mean in zip(at_s, found, strict=True):
        inside = (time_s >= moment - WINDOW_S / 2) & (time_s < moment + WINDOW_S / 2)
        if inside.any():
            assert mean == pytest.approx(value[inside].mean())
        else:
            assert np.isnan(mean)


def test_calibration_of_two_groups() -> None:
    predicted = np.repeat([0.2, 0.8], 50)
    label = np.r_[np.arange(50) < 15, np.arange(50) < 30].astype(np.uint8)  # 0.3 and 0.6
    assert expected_calibration_error(predicted, label, bins=2) == pytest.approx((0.1 + 0.2) / 2)
    assert expected_calibration_error(predicted, predicted, bins=2) == 0
    # All in one bin: errors of both signs meet.
    assert expected_calibration_error(predicted, label, bins=1) == pytest.approx(0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_quality_against_labels_and_against_the_truth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.05, 0.9, 20_000)
    label = (rng.random(len(truth)) < truth).astype(np.uint8)
    user = rng.integers(0, 200, len(truth))
    exact, doubled = quality(user, truth, label, truth), quality(user, truth / 2, label, truth)
    assert exact["auc"] == exact["best_auc"] == doubled["auc"]
    assert exact["gauc"] == exact["best_gauc"]
    assert exact["predicted_true"] == 1 and exact["ece_true"] == exact["excess_loss"] == 0
    assert exact["predicted_observed"] == pytest.approx(1, abs=0.02) and exact["ece_observed"] < 0.03
    assert doubled["predicted_true"] == pytest.approx(0.5)
    assert doubled["ece_true"] == pytest.approx((truth / 2).mean())
    cross = -(truth * np.log(truth / 2) + (1 - truth) * np.log(1 - truth / 2)).mean()
    entropy = -(truth * np.log(truth) + (1 - truth) * np.log(1 - truth)).mean()
    assert excess_loss(truth / 2, truth) == pytest.approx(cross - entropy)
    flat = quality(user, np.full(len(truth), truth.mean()), label, truth)
    assert flat["excess_loss"] == flat["constant_excess_loss"] == exact["constant_excess_loss"] > 0
    assert np.isnan(quality(user, truth, np.zeros(len(truth), np.uint8), truth)["auc"])
