"""Tests of the exact marginal probabilities against an enumeration of the tree, and of the weights against tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trainer.data.simulator.behaviours import (
    CATEGORY_WEIGHTS,
    CONTEXTS,
    DEPTH_OFFSET,
    FACTORS,
    LIVE_WEIGHTS,
    SCENE_OFFSET,
    UNCLICKED_OFFSET,
    VIDEO_WEIGHTS,
    behaviour_probabilities,
    log_odds,
)
from trainer.data.simulator.config import BEHAVIOURS


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def enumerated(logit: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the marginals of one exposure, alone and jointly with click and long view, by enumerating the tree."""
    marginal, with_long = np.zeros(7), np.zeros(7)
    for click, effective, long in itertools.product((0, 1), repeat=3):
        if long and not effective:
            continue
        p_effective = sigmoid(logit[1] + UNCLICKED_OFFSET[0, click])
        p_long = sigmoid(logit[2] + UNCLICKED_OFFSET[1, click]) if effective else 0.0
        p = sigmoid(logit[0]) if click else 1 - sigmoid(logit[0])
        p *= p_effective if effective else 1 - p_effective
        p *= p_long if long else 1 - p_long
        marginal[:3] += p * np.array([click, effective, long])
        with_long[0] += p * click * long
        for k in range(4):
            acts = allowed[k] * sigmoid(logit[3 + k] + DEPTH_OFFSET[effective + long, k]) if click else 0.0
            marginal[3 + k] += p * acts
            with_long[3 + k] += p * acts * long
    return marginal, with_long


@pytest.mark.parametrize("seed", range(3))
def test_marginals_are_sums_over_the_tree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, (7, 200)).astype(np.float32)
    allowed = rng.integers(0, 2, (4, 200)).astype(np.float32)
    found = behaviour_probabilities(logits, allowed)
    for row in range(200):
        marginal, with_long = enumerated(logits[:, row].astype(np.float64), allowed[:, row])
        np.testing.assert_allclose(found.marginal[:, row], marginal, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.marginal_long[:, row], with_long, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_log_odds_are_linear_in_the_factors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((len(FACTORS), 50)).astype(np.float32)
    context, scene = rng.integers(0, len(CONTEXTS), 50), rng.integers(0, SCENE_OFFSET.shape[1], 50)
    trait = rng.standard_normal((7, 50)).astype(np.float32)
    found = log_odds(factors, context, scene, trait)
    for row in range(50):
        name = CONTEXTS[context[row]]
        for k, behaviour in enumerate(BEHAVIOURS):
            expected = trait[k, row] + SCENE_OFFSET[k, scene[row]]
            for f, factor in enumerate(FACTORS):
                weight = float((VIDEO_WEIGHTS if name == "video" else LIVE_WEIGHTS)[f, k])
                weight += CATEGORY_WEIGHTS.get(name, {}).get(factor, {}).get(behaviour, 0.0)
                expected += weight * factors[f, row]
            assert found[k, row] == pytest.approx(expected, rel=1e-4, abs=1e-4)
