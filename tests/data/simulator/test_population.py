"""Users of a simulated world: the correlation of their interests in videos and in rooms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.behaviours import FACTORS
from trainer.data.simulator.config import START_MS, WorldConfig
from trainer.data.simulator.content import LIVE, VIDEO
from trainer.data.simulator.population import Users, make_genres, make_users
from trainer.data.simulator.user_days import ExposureStep, RequestState, visit_factors
from trainer.data.simulator.world import make_world
from trainer.data.simulator.write_dataset import simulate

USERS, SHOWN = 3000, 20_000


def users(seed: int, correlation: float | None) -> Users:
    config = WorldConfig(USERS, 1, seed, interest_correlation=correlation)
    return make_users(config, make_genres(config))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("wanted", [0.0, 0.5, 0.9, 1.0])
def test_interests_have_the_correlation_and_the_same_distribution(seed: int, wanted: float) -> None:
    video, live = users(seed, wanted).vector
    found = np.array([np.corrcoef(video[:, d], live[:, d])[0, 1] for d in range(video.shape[1])])
    # A run is wrong, not unlucky, beyond 4.5 standard errors; genres make the numbers of a vector less than normal.
    assert np.abs(found - wanted).max() < 4.5 * 1.2 / np.sqrt(USERS)
    assert live.std(axis=0) == pytest.approx(video.std(axis=0), rel=0.1)
    assert live.mean(axis=0) == pytest.approx(video.mean(axis=0), abs=0.1)


def test_interests_of_earlier_versions_are_the_default() -> None:
    video, live = users(1, None).vector
    assert 0.6 < np.mean([np.corrcoef(video[:, d], live[:, d])[0, 1] for d in range(video.shape[1])]) < 0.8


def test_nothing_else_of_the_users_changes() -> None:
    plain, other = (users(4, correlation) for correlation in (None, 0.3))
    assert not np.array_equal(plain.vector[LIVE], other.vector[LIVE])
    assert np.array_equal(plain.vector[VIDEO], other.vector[VIDEO])
    for name in ("favourites", "category_interest", "topic_taste", "trait", "novelty", "daily", "shift_hours"):
        assert np.array_equal(getattr(plain, name), getattr(other, name)), name
    assert all(np.array_equal(plain.side[name], other.side[name]) for name in plain.side)


@pytest.mark.parametrize("seed", [1, 2])
def test_true_factors_follow_the_correlation(seed: int) -> None:
    """The factors of one user and one room, by the interest in rooms and by that in videos."""
    for wanted in (0.0, 0.5, 0.9):
        world = make_world(WorldConfig(USERS, 1, seed, interest_correlation=wanted))
        rng = np.random.default_rng(seed)
        user = rng.integers(0, USERS, SHOWN)
        item = rng.integers(world.items.videos, len(world.items.author), SHOWN)
        nothing = np.zeros(SHOWN, np.int64)
        state = RequestState(nothing, nothing > 0, nothing.astype(np.uint8), nothing)
        of_domain = []
        for domain in (VIDEO, LIVE):
            times = np.full(SHOWN, START_MS) if domain == VIDEO else world.items.start_ms[item]
            author = world.items.author[item]
            shown = ExposureStep(nothing, user, times, nothing, nothing + domain, item, author)
            of_domain.append(visit_factors(world, shown, state)[0])
        for name in ("taste", "hold", "social"):
            row = FACTORS.index(name)
            own = [factors[row] - _room_means(factors[row], item) for factors in of_domain]
            assert np.corrcoef(*own)[0, 1] == pytest.approx(wanted, abs=0.1), name


def _room_means(values: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Return the mean over users of each line's room: what all users think of it is no interest of one user."""
    _, place = np.unique(room, return_inverse=True)
    means: np.ndarray = (np.bincount(place, values) / np.bincount(place))[place]
    return means


def test_training_reads_nothing_of_the_correlation(tmp_path: Path) -> None:
    """Two worlds differ in what users do, and in one word of the description that no feature comes from."""
    for name, correlation in (("low", 0.0), ("high", 1.0), ("plain", None)):
        simulate(tmp_path / name, 70, 1, 2, 3, interest_correlation=correlation)
    for file in ("users.parquet", "authors.parquet", "items.parquet"):
        assert (tmp_path / "low" / file).read_bytes() == (tmp_path / "high" / file).read_bytes(), file
    assert "interest_correlation" not in DatasetSpec.load(tmp_path / "plain").extra
    low, high = (json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("low", "high"))
    assert low["extra"].pop("interest_correlation") == 0 and high["extra"].pop("interest_correlation") == 1
    assert low["extra"] == high["extra"]
    for key in ("side", "dense", "statistics", "behaviours", "tag"):
        assert low[key] == high[key], key
