"""Tests of the exact marginal probabilities against an enumeration of the tree, and of the weights against tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trainer.data.simulator.behaviours import (
    CATEGORY_WEIGHTS,
    CLICK,
    CONFLICT_FACTORS,
    CONTEXTS,
    DEPTH_OFFSET,
    FACTORS,
    INTERACTIONS,
    LIVE_WEIGHTS,
    SCENE_OFFSET,
    UNCLICKED_OFFSET,
    VIDEO_WEIGHTS,
    WEIGHTS,
    behaviour_probabilities,
    log_odds,
    weights_of,
)
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.content import LIVE
from trainer.data.simulator.user_days import simulate_visits
from trainer.data.simulator.world import make_world


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


def test_a_conflict_turns_what_draws_interactions() -> None:
    assert weights_of(0.0) is WEIGHTS
    own = [FACTORS.index(name) for name in CONFLICT_FACTORS]
    together = WEIGHTS[:, INTERACTIONS][:, :, own] + WEIGHTS[:, [CLICK]][:, :, own]
    for conflict in (0.25, 0.5, 1.0):
        found = weights_of(conflict)
        sums = found[:, INTERACTIONS][:, :, own] + found[:, [CLICK]][:, :, own]
        np.testing.assert_allclose(sums, (1 - 2 * conflict) * together, atol=1e-6)
        others = [f for f, name in enumerate(FACTORS) if name not in (*CONFLICT_FACTORS, "constant")]
        assert np.array_equal(found[:, :, others], WEIGHTS[:, :, others])
        assert np.array_equal(found[:, : INTERACTIONS.start], WEIGHTS[:, : INTERACTIONS.start])
    assert np.array_equal(weights_of(0.0), WEIGHTS), "the weights of other worlds do not change"


def live_truth(conflict: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the true probabilities of the rooms' visits, and those by users who do not follow the author yet."""
    visits = list(simulate_visits(make_world(WorldConfig(400, 2, seed, conflict=conflict))))
    live = [day["domain"] == LIVE for day in visits]
    of_all = [day["truth"][:, rows] for day, rows in zip(visits, live, strict=True)]
    of_new = [day["truth"][:, rows & ~day["following"]] for day, rows in zip(visits, live, strict=True)]
    return np.concatenate(of_all, axis=1), np.concatenate(of_new, axis=1)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_conflict_parts_clicks_from_interactions_and_keeps_their_number(seed: int) -> None:
    of_conflict, of_new = zip(*(live_truth(conflict, seed) for conflict in (0.0, 0.5, 1.0)), strict=True)
    odds = [np.log(truth / (1 - truth)) for truth in of_new]
    for k in range(len(BEHAVIOURS))[INTERACTIONS]:
        none, half, full = (np.corrcoef(values[CLICK], values[k])[0, 1] for values in odds)
        assert none > half + 0.1 > full + 0.3 and full < 0.25, BEHAVIOURS[k]
        rates = [truth[k].mean() for truth in of_conflict]
        assert all(0.6 < rate / rates[0] < 1.7 for rate in rates), BEHAVIOURS[k]
    for k in range(INTERACTIONS.start):
        assert of_conflict[2][k].mean() == pytest.approx(of_conflict[0][k].mean(), rel=0.1)
