"""Calibration of the scores of options: equal to a plain optimiser, never worse than chance where it is fitted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from trainer.llm.finetuning.option_calibration import Calibration, fit_calibration

SEEDS = range(3)
PENALTY = 1e-4


def made(seed: int, samples: int = 300) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Scores three times too large, with a part that the text has by itself; answers drawn from the true ones."""
    random = np.random.default_rng(seed)
    scores, bare, answers = [], [], []
    for _ in range(samples):
        options = int(random.integers(2, 6))
        worth, own = random.normal(size=options), 4 * random.normal(size=options)
        chance = np.exp(worth - worth.max())
        answers.append(int(random.choice(options, p=chance / chance.sum())))
        scores.append(3 * worth + own)
        bare.append(own)
    return scores, bare, answers


def log_loss(logits: list[np.ndarray], answers: list[int]) -> float:
    losses = [np.log(np.exp(one - one.max()).sum()) + one.max() - one[answer] for one, answer in
              zip(logits, answers, strict=True)]  # fmt: skip
    return float(np.mean(losses))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_bare", [True, False])
def test_the_fit_is_the_least_log_loss(seed: int, with_bare: bool) -> None:
    scores, bare, answers = made(seed)
    given = bare if with_bare else [None] * len(scores)
    found = fit_calibration(scores, given, answers)

    def loss(weights: np.ndarray) -> float:
        logits = [weights[0] * one - weights[1] * other for one, other in zip(scores, bare, strict=True)]
        return log_loss(logits, answers) + PENALTY * float(weights @ weights)

    bounds = [(None, None), (None, None) if with_bare else (0, 0)]
    expected = minimize(loss, np.zeros(2), bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}).x
    assert [found.scale, found.bare] == pytest.approx(expected, abs=1e-4)
    assert found.samples == 300 and (with_bare or found.bare == 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_other_samples_the_loss_is_below_chance_and_the_choice_is_better(seed: int) -> None:
    fitted = fit_calibration(*made(seed))
    scores, bare, answers = made(seed + 100, 1000)
    assert fitted.scale == pytest.approx(1 / 3, abs=0.1) and fitted.bare == pytest.approx(1 / 3, abs=0.1)
    logits = [fitted.logits(one, other) for one, other in zip(scores, bare, strict=True)]
    chance = float(np.mean([np.log(len(one)) for one in scores]))
    assert log_loss(logits, answers) < chance < log_loss(scores, answers)

    def right(values: list[np.ndarray]) -> float:
        return float(np.mean([one.argmax() == answer for one, answer in zip(values, answers, strict=True)]))

    assert right(logits) > right(scores)


def test_scores_that_say_nothing_give_chance() -> None:
    random = np.random.default_rng(1)
    scores = [50 * random.normal(size=4) for _ in range(2000)]
    found = fit_calibration(scores, [None] * 2000, random.integers(0, 4, 2000).tolist())
    assert abs(found.scale) < 0.002


def test_samples_that_are_all_right_or_all_alike_have_a_finite_fit() -> None:
    found = fit_calibration([np.array([0.0, 5.0])] * 20, [np.array([1.0, 1.0])] * 20, [1] * 20)
    assert 0 < found.scale < 100 and found.bare == pytest.approx(0)
    assert fit_calibration([np.zeros(3)], [None], [2]) == Calibration(0, 0, 1)


def test_a_task_in_which_one_sample_has_no_bare_prompt_has_a_scale_only() -> None:
    scores, bare, answers = made(1)
    mixed = fit_calibration(scores, [None, *bare[1:]], answers)
    assert mixed == fit_calibration(scores, [None] * len(scores), answers) and mixed.bare == 0
    np.testing.assert_array_equal(Calibration(2.0, 0.5, 1).logits(scores[0], None), 2 * scores[0])
