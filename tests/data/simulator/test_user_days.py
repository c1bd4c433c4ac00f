"""Tests of the blocks of users and of their state."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.simulator import user_days
from trainer.data.simulator.behaviours import EFFECTIVE_VIEW, FOLLOW
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.user_state import FAMILIAR_AUTHORS, initial_user_state
from trainer.data.simulator.world import make_world


def test_blocks_cover_all_users_and_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_days, "BLOCK", 64)
    world = make_world(WorldConfig(users=150, days=3, seed=0))
    parts = list(user_days.simulate_visits(world))
    assert len(parts) == 3 * 3
    users = np.concatenate([part["user_id"] for part in parts])
    assert len(np.unique(users)) > 140 and users.max() < 150
    visit = np.concatenate([part["visit_id"] for part in parts])
    assert len(np.unique(visit)) == len(visit)
    # a user's visits are numbered in time order
    time = np.concatenate([part["request_ms"] for part in parts])
    order = np.argsort(visit)
    same = users[order][1:] == users[order][:-1]
    assert (np.diff(visit[order])[same] == 1).all() and (np.diff(time[order])[same] > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_exposures_a_day(seed: int) -> None:
    parts = list(user_days.simulate_visits(make_world(WorldConfig(users=2_000, days=1, seed=seed))))
    assert 30 < sum(len(part["user_id"]) for part in parts) / 2_000 < 40


def test_user_state_keeps_follows_views_and_the_latest_familiar_authors() -> None:
    config = WorldConfig(users=40, days=1, seed=2)
    world = make_world(config)
    state = initial_user_state(world, np.arange(40), config.generator("memory", 0))
    rng = np.random.default_rng(0)
    following, views = state.following.copy(), state.views.astype(np.int64)
    latest: list[list[int]] = [[] for _ in range(40)]
    for _ in range(300):
        rows = rng.permutation(40)[:25]
        author = rng.integers(0, config.authors, 25)
        delay = np.where(rng.random((len(BEHAVIOURS), 25)) < 0.5, 1, -1)
        state.record_outcomes(rows, author, delay)
        for j, user in enumerate(rows):
            following[user, author[j]] |= delay[FOLLOW, j] > 0
            views[user, author[j]] += delay[EFFECTIVE_VIEW, j] > 0
            if delay[FOLLOW, j] > 0 or delay[EFFECTIVE_VIEW, j] > 0:
                latest[user].append(author[j])
    np.testing.assert_array_equal(state.following, following)
    np.testing.assert_array_equal(state.views, views)
    for user in range(40):
        assert sorted(state.familiar[:, user]) == sorted(latest[user][-FAMILIAR_AUTHORS:])
