"""Strength with which rates are drawn towards the overall rate."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.features.dense_inputs import smoothing_strength


def test_a_rarer_behaviour_is_drawn_more_strongly() -> None:
    strength = smoothing_strength(np.array([0.5, 0.1, 0.01]), 10.0)
    assert strength == pytest.approx([10.0, 10 / 0.6, 10 / (2 * np.sqrt(0.0099))])


def test_one_minus_the_rate_is_drawn_as_strongly() -> None:
    prior = np.random.default_rng(0).random(20)
    np.testing.assert_allclose(smoothing_strength(prior, 3.0), smoothing_strength(1 - prior, 3.0))
