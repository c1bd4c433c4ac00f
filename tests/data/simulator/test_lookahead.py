"""Tests of the option that lets long views and gifts depend on what comes next in a room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.lookahead import MEAN_APPEAL, SEGMENTS_AHEAD, WEIGHTS, appeal_ahead
from trainer.data.simulator.population import TOPICS
from trainer.data.simulator.world import SimulatedWorld, make_world
from trainer.data.simulator.write_dataset import simulate

USERS, DAYS, SEED = 500, 2, 6
SIGMAS = 4.5
"""A run is wrong, not unlucky, beyond so many standard errors."""


@pytest.fixture(scope="module")
def world() -> SimulatedWorld:
    return make_world(WorldConfig(USERS, DAYS, SEED))


@pytest.fixture(scope="module", params=[False, True], ids=["off", "on"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path]:
    out = tmp_path_factory.mktemp("world") / "dataset"
    simulate(out, USERS, DAYS, 2, SEED, lookahead=request.param)
    return request.param, out


def live_visits(path: Path, world: SimulatedWorld) -> dict[str, np.ndarray]:
    """Return user, room, time and true probabilities of the visits to rooms."""
    read = [pa.concat_tables(map(pq.read_table, sorted((path / name).glob("part-*")))) for name in ("truth", "events")]
    truth, events = (table.sort_by([("visit_id", "ascending")]) for table in read)
    visit = truth.column("visit_id").to_numpy()
    at = np.searchsorted(events.column("visit_id").to_numpy(), visit)
    item = events.column("item_id").to_numpy()[at]
    columns = {name: truth.column(name).to_numpy() for name in truth.column_names} | {"item": item}
    return {name: values[item >= world.items.videos] for name, values in columns.items()}


def effects_of_what_comes(path: Path, world: SimulatedWorld) -> dict[str, float]:
    """Return, for each behaviour, the effect of the intensity of the next three minutes in standard errors.

    It is the effect in a linear regression of the true log-probability, beside all that the segment on air says: its
    topic, and its intensity with a slope of its own for each topic. The log-probabilities of a click and of an
    effective view stand for user, author and hour.
    """
    items, visits = world.items, live_visits(path, world)
    segment = items.segment(visits["item"], visits["request_ms"])
    ahead = segment + np.arange(1, SEGMENTS_AHEAD + 1)[:, None]
    whole = ahead[-1] < items.first_segment[visits["item"] + 1]
    later = items.intensity[np.minimum(ahead, len(items.topic) - 1)].mean(axis=0)
    topic = np.eye(len(TOPICS))[items.topic[segment]][:, 1:]
    intensity = items.intensity[segment]
    known = np.concatenate([topic, topic * intensity[:, None]], axis=1)[whole]
    odds = {name: np.log(visits[f"p_{name}"][whole].astype(np.float64)) for name in ("click", "effective_view")}
    effects = {}
    for name in ("click", "long_view", "gift"):
        target = np.log(visits[f"p_{name}"][whole].astype(np.float64))
        others = [values for other, values in odds.items() if name != other]
        design = np.column_stack([known, *others, later[whole]])
        inverse = np.linalg.pinv(design.T @ design)
        slope = inverse @ design.T @ target
        rest = target - design @ slope
        error = np.sqrt((inverse @ (design * rest[:, None] ** 2).T @ design @ inverse)[-1, -1])
        effects[name] = slope[-1] / error
    return effects


def test_what_comes_predicts_long_views_and_gifts_only_with_the_option(
    log: tuple[bool, Path], world: SimulatedWorld
) -> None:
    on, path = log
    effects = effects_of_what_comes(path, world)
    assert abs(effects.pop("click")) < SIGMAS
    for name, effect in effects.items():
        assert effect > 2 * SIGMAS if on else abs(effect) < SIGMAS, name


def test_the_description_names_the_option_only_where_it_is_on(log: tuple[bool, Path]) -> None:
    on, path = log
    assert DatasetSpec.load(path).extra.get("lookahead", False) is on


def test_the_outcomes_follow_the_changed_probabilities(log: tuple[bool, Path], world: SimulatedWorld) -> None:
    _, path = log
    visits = live_visits(path, world)
    events = pa.concat_tables(map(pq.read_table, sorted((path / "events").glob("part-*"))))
    kind, visit = np.array(events.column("event").to_pylist()), events.column("visit_id").to_numpy()
    for name in ("long_view", "gift"):
        p = visits[f"p_{name}"].astype(np.float64)
        happened = np.isin(visits["visit_id"], visit[kind == name])
        for part in np.array_split(np.argsort(p), 3):
            error = np.sqrt((p[part] * (1 - p[part])).sum())
            assert abs(happened[part].sum() - p[part].sum()) <= SIGMAS * error, name


def test_the_appeal_is_the_mean_over_the_segments_that_follow(world: SimulatedWorld) -> None:
    items, rng = world.items, np.random.default_rng(0)
    item = rng.integers(items.videos, len(items.author), 200)
    left = np.where(rng.random(200) < 0.5, rng.random(200), rng.random(200) * 0.05)
    time_ms = items.end_ms[item] - 1 - (left * (items.end_ms - items.start_ms)[item]).astype(np.int64)
    time_ms = np.maximum(time_ms, items.start_ms[item])
    taste = rng.standard_normal((200, len(TOPICS))).astype(np.float32)
    found = appeal_ahead(items, taste, item, time_ms)
    ends = 0
    for row in range(200):
        now = items.first_segment[item[row]] + (time_ms[row] - items.start_ms[item[row]]) // 30_000
        following = range(now + 1, min(now + 7, items.first_segment[item[row] + 1]))
        values = [items.intensity[place] * (1 + 0.5 * taste[row, items.topic[place]]) for place in following]
        assert found[row] == pytest.approx(np.mean(values) if values else MEAN_APPEAL, abs=1e-5)
        ends += not values
    assert ends > 0 and set(WEIGHTS) == {BEHAVIOURS.index("long_view"), BEHAVIOURS.index("gift")}


def test_base_rates_stay_near_those_without_it(log: tuple[bool, Path], world: SimulatedWorld) -> None:
    _, path = log
    visits = live_visits(path, world)
    assert 0.06 < visits["p_long_view"].mean() < 0.1
    assert 0.008 < visits["p_gift"].mean() < 0.018
