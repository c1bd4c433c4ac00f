"""The factors of a simulated world add up to its truth, and nothing else changes when they are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.format.schema import DatasetSpec
from trainer.data.format.verification import verify_dataset
from trainer.data.simulator.behaviours import CLICK, FACTORS, behaviour_probabilities
from trainer.data.simulator.config import BEHAVIOURS, WorldConfig
from trainer.data.simulator.factors import (
    AHEAD,
    INCLINATIONS,
    KEYS,
    SCENE_FACTORS,
    factor_names,
    factor_tables,
    factor_weights,
)
from trainer.data.simulator.user_days import allowed_interactions, simulate_visits
from trainer.data.simulator.world import make_world
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.checksums import CHECKSUMS

PARTITIONS = 3
CONFIG = WorldConfig(users=100, days=1, seed=5, lookahead=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "dataset"
    simulate(out, CONFIG.users, CONFIG.days, PARTITIONS, CONFIG.seed, lookahead=True, factors=True)
    return out


def read(path: Path, kind: str) -> pa.Table:
    return pa.concat_tables(map(pq.read_table, sorted((path / "truth").glob(f"{kind}-*.parquet"))))


def log_odds(path: Path) -> np.ndarray:
    """Return the sums of weight times factor as a reader of the files computes them, ``[behaviours, n]``."""
    factors, weights = read(path, "factors"), pq.read_table(path / "truth" / "factor_weights.parquet").to_pylist()
    context = factors["context"].to_numpy()
    total = np.zeros((len(BEHAVIOURS), len(context)))
    for line in weights:
        rows = context == line["context"]
        total[BEHAVIOURS.index(line["behaviour"]), rows] += line["weight"] * factors[line["factor"]].to_numpy()[rows]
    return total


def test_factors_have_the_lines_of_the_truth_in_its_order(path: Path) -> None:
    names = [*FACTORS, *SCENE_FACTORS, *INCLINATIONS, AHEAD]
    assert list(SCENE_FACTORS) == ["scene_following", "scene_nearby", "scene_plaza"]
    assert DatasetSpec.load(path).extra["factors"] == names
    # A world whose behaviours do not depend on the next minutes has no such factor.
    assert list(factor_names(replace(CONFIG, lookahead=False))) == names[:-1]
    for partition in range(PARTITIONS):
        truth, factors = (
            pq.read_table(path / "truth" / f"{kind}-{partition:05d}.parquet") for kind in ("part", "factors")
        )
        assert factors.num_rows > 300 and factors.column_names == [*KEYS, "context", *names]
        assert factors.select(KEYS) == truth.select(KEYS)
        assert all(factors[name].type == pa.float32() for name in names)


def test_the_sum_of_the_factors_is_the_true_log_odds(path: Path) -> None:
    factors, truth, total = read(path, "factors"), read(path, "part"), log_odds(path)
    # A click depends on nothing before it, so its probability is the logistic function of the sum.
    click = truth["p_click"].to_numpy().astype(np.float64)
    assert np.allclose(total[CLICK], np.log(click / (1 - click)), atol=2e-5)
    # All other behaviours follow branches of the visit; with their sums the whole tree gives the true probabilities.
    allowed = allowed_interactions(factors["context"].to_numpy() > 0, factors["following"].to_numpy() > 0)
    found = behaviour_probabilities(total.astype(np.float32), allowed).marginal
    for k, behaviour in enumerate(BEHAVIOURS):
        assert np.allclose(found[k], truth[f"p_{behaviour}"].to_numpy(), atol=1e-7, rtol=1e-4), behaviour


@pytest.mark.parametrize("conflict", [0.0, 0.7])
def test_factors_and_weights_of_a_conflict_are_its_log_odds(conflict: float) -> None:
    config = WorldConfig(users=60, days=1, seed=2, conflict=conflict)
    made = make_world(config)
    visits = next(simulate_visits(made))
    factors, weights = pa.concat_tables(factor_tables(made, visits)), factor_weights(config).to_pylist()
    total = np.zeros((len(BEHAVIOURS), factors.num_rows))
    for line in weights:
        rows = factors["context"].to_numpy() == line["context"]
        total[BEHAVIOURS.index(line["behaviour"]), rows] += line["weight"] * factors[line["factor"]].to_numpy()[rows]
    allowed = allowed_interactions(factors["context"].to_numpy() > 0, factors["following"].to_numpy() > 0)
    found = behaviour_probabilities(total.astype(np.float32), allowed).marginal
    assert np.allclose(found, visits["truth"], atol=1e-7, rtol=1e-4)


def test_every_factor_counts_in_rooms_and_varies(path: Path) -> None:
    weights = pq.read_table(path / "truth" / "factor_weights.parquet").to_pylist()
    assert {line["factor"] for line in weights if line["context"] > 0} == {*factor_names(CONFIG)}
    factors = read(path, "factors")
    live = factors["context"].to_numpy() > 0
    for name in factor_names(CONFIG):
        values = factors[name].to_numpy()[live]
        assert (np.ptp(values) == 0) == (name == "constant"), name


def test_a_mood_is_1_where_the_genre_is_the_one_that_the_user_prefers() -> None:
    made = make_world(WorldConfig(users=40, days=1, seed=1))
    visits = next(simulate_visits(made))
    mood = pa.concat_tables(factor_tables(made, visits))["mood"].to_numpy()
    assert np.array_equal(mood == 1, made.items.genre[visits["item_id"]] == visits["mood"])
    assert np.isin(mood, (0, 1)).all() and 0.05 < mood.mean() < 0.95


def test_the_log_is_the_same_byte_for_byte_without_factors(path: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "plain", CONFIG.users, CONFIG.days, PARTITIONS, CONFIG.seed, lookahead=True)
    files = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (path, tmp_path / "plain")
    ]
    added = {f"truth/factors-{partition:05d}.parquet" for partition in range(PARTITIONS)}
    assert files[0].keys() - files[1].keys() == added | {"truth/factor_weights.parquet"}
    changed = {name for name, content in files[1].items() if files[0][name] != content}
    assert changed == {"dataset.json", CHECKSUMS}
    specs = [json.loads(contents["dataset.json"]) for contents in files]
    assert specs[0]["extra"].pop("factors") and specs[0] == specs[1]


def test_the_manifest_lists_the_files_and_finds_damage(path: Path) -> None:
    assert verify_dataset(str(path), lambda *call: None).problems == ()
    file = path / "truth" / "factors-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert any(
            "truth/factors-00001.parquet: damaged" in problem
            for problem in verify_dataset(str(path), lambda *call: None).problems
        )
    finally:
        file.write_bytes(whole)
