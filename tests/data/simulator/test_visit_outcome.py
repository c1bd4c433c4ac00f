"""Tests of the outcomes of many visits against the exact probabilities and Table 1 of Moment&Cross."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.simulator.behaviours import EFFECTIVE_VIEW, GIFT, LONG_VIEW, behaviour_probabilities
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.event_log import gift_prices
from trainer.data.simulator.visit_outcome import (
    FAST_MS,
    SLOW_MS,
    LateShare,
    VisitOutcome,
    draw_outcome,
    visit_thresholds,
)
from trainer.data.simulator.world import make_world

# Written out here a second time: the paper's table is the specification.
TABLE_1 = {"click": 0.96, "long_view": 1.00, "like": 0.79, "comment": 0.78, "gift": 0.68}
GIFT_PRICE = 0.34
MINUTE = 60_000
SIGMAS = 4.5


def outcomes(seed: int, calls: int, n: int) -> VisitOutcome:
    """Return outcomes of live visits with frequent interactions, in rooms that stay open for 2 minutes to 3 hours."""
    rng = np.random.default_rng(seed)
    late_share = LateShare()
    found = []
    for _ in range(calls):
        logits = rng.normal([[-0.5], [0.5], [0.0], [-1], [-1.5], [-1.5], [-1]], 1.5, (7, n)).astype(np.float32)
        live = np.ones(n, bool)
        left = rng.integers(2 * MINUTE, 180 * MINUTE, n)
        probabilities = behaviour_probabilities(logits, np.ones((4, n), np.float32))
        outcome = draw_outcome(rng, probabilities, visit_thresholds(live, left), live, late_share)
        assert (outcome.play_ms <= left).all()
        found.append(outcome)
    return VisitOutcome(np.concatenate([o.delay for o in found], axis=1), np.concatenate([o.play_ms for o in found]))


@pytest.mark.parametrize("n", [40, 4_000])
def test_table_1(n: int) -> None:
    delay = outcomes(seed=1, calls=160_000 // n, n=n).delay
    for behaviour, share in TABLE_1.items():
        first = delay[BEHAVIOURS.index(behaviour)]
        first = first[(first >= 0) & (first <= SLOW_MS)]
        assert len(first) > 10_000
        error = np.sqrt(max(share * (1 - share), 1e-12) / len(first))
        assert abs((first <= FAST_MS).mean() - share) <= SIGMAS * error, behaviour


@pytest.mark.parametrize("seed", range(2))
def test_gift_price_share_of_table_1(seed: int) -> None:
    world = make_world(WorldConfig(users=3_000, days=1, seed=seed))
    rng = np.random.default_rng(seed)
    delay = outcomes(seed, calls=40, n=5_000).delay
    user = rng.integers(0, 3_000, delay.shape[1])
    price = gift_prices(world, {"delay": delay, "user_id": user}, rng).astype(np.float64)
    assert ((price > 0) == (delay[GIFT] >= 0)).all()
    early = (delay[GIFT] >= 0) & (delay[GIFT] <= FAST_MS)
    total = price.sum()
    share = price[early].sum() / total
    # delta method, over gifts
    error = np.sqrt(((price * (early - share)) ** 2).sum()) / total
    assert error < 0.01
    assert abs(share - GIFT_PRICE) <= SIGMAS * error


def test_outcomes_have_the_exact_probabilities() -> None:
    rng = np.random.default_rng(5)
    kinds, repeats = 12, 20_000
    logits = np.repeat(rng.normal(-0.5, 1.2, (7, kinds)), repeats, axis=1).astype(np.float32)
    live = np.repeat(np.arange(kinds) % 2 == 0, repeats)
    allowed = np.ones((4, len(live)), np.float32)
    probabilities = behaviour_probabilities(logits, allowed)
    left = rng.integers(2 * MINUTE, 90 * MINUTE, len(live))
    outcome = draw_outcome(rng, probabilities, visit_thresholds(live, left), live, LateShare())
    happened = (outcome.delay >= 0).reshape(7, kinds, repeats).sum(axis=2)
    p = probabilities.marginal.reshape(7, kinds, repeats)[:, :, 0].astype(np.float64)
    assert (np.abs(happened - repeats * p) <= SIGMAS * np.sqrt(repeats * p * (1 - p))).all()


@pytest.mark.parametrize("live", [True, False])
def test_a_visit_is_consistent(live: bool) -> None:
    rng = np.random.default_rng(7)
    n = 50_000
    on_air = np.full(n, live)
    left = rng.integers(2 * MINUTE, 90 * MINUTE, n) if live else rng.integers(5_000, 200_000, n)
    limits = visit_thresholds(on_air, left)
    logits = rng.normal(0, 1.5, (7, n)).astype(np.float32)
    outcome = draw_outcome(
        rng, behaviour_probabilities(logits, np.ones((4, n), np.float32)), limits, on_air, LateShare()
    )
    delay, play = outcome.delay, outcome.play_ms
    assert (delay.max(axis=0) <= play).all() and (play <= limits.limit).all()
    np.testing.assert_array_equal(delay[EFFECTIVE_VIEW] >= 0, play >= limits.effective)
    np.testing.assert_array_equal(delay[LONG_VIEW] >= 0, play >= limits.long)
    acted = delay[3:] >= 0
    assert (delay[0] >= 0)[acted.any(axis=0)].all()
    assert (delay[3:] >= delay[0])[acted].all()
    if not live:
        assert (delay <= 3 * left).all()
