"""Estimates of hidden factors: near the truth, worth less than it, and kept for one world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import estimated_factors, gap
from benchmarks.quality.estimated_factors import ESTIMATED, with_estimates
from benchmarks.quality.gap_report import tables
from benchmarks.quality.world_factors import WorldFactors
from tests.benchmarks.quality.test_gap import factors, rooms, without, world, write_run
from trainer.console.errors import UserError
from trainer.data.simulator.config import WorldConfig

__all__ = ["factors", "rooms", "world"]
"""Fixtures of tests/benchmarks/quality/test_gap.py."""

USERS, DAYS, SEED = 200, 3, 1


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("estimates") / "kept.npz"


@pytest.fixture(scope="module")
def estimates(kept: Path, rooms: dict[str, np.ndarray], factors: WorldFactors) -> WorldFactors:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.quality.hidden_state.POPULATION", 2_000)
        return with_estimates(kept, WorldConfig(USERS, DAYS, SEED), rooms["visit_id"], factors)


def test_estimates_are_near_the_truth_and_the_rest_is_the_truth(factors: WorldFactors, estimates: WorldFactors) -> None:
    assert set(ESTIMATED) < set(factors.names)
    for name, true, found in zip(factors.names, factors.values, estimates.values, strict=True):
        if name not in ESTIMATED:
            np.testing.assert_array_equal(found, true, err_msg=name)
            continue
        assert np.isfinite(found).all() and not np.array_equal(found, true), name
        if name in ("mood", "taste", "hold", "category", "intensity", "quality", "inclination_click"):
            assert np.corrcoef(found, true)[0, 1] > 0.2, name


def test_a_run_gains_from_an_estimate_less_than_from_the_truth(
    world: Path,
    rooms: dict[str, np.ndarray],
    factors: WorldFactors,
    estimates: WorldFactors,
    kept: Path,
    tmp_path: Path,
) -> None:
    directory = write_run(tmp_path / "run", world, rooms, click=without(factors, "taste"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap, "DRAWS", 20)
        found = gap.read_gap([directory], None, None, kept).measure()
    click = found["behaviours"]["click"]
    gains = {name: line["estimate_gain"]["mean"] for name, line in click["alone"].items()}
    assert max(gains, key=lambda name: gains[name]) == "taste"
    assert 0 < gains["taste"] < click["alone"]["taste"]["auc_gain"]["mean"] < 20
    assert gains["taste"] < click["estimates_gain"]["mean"] + 1
    printed = tables(found)
    assert "its estimate" in printed and "points of AUC from the estimates of all factors at once" in printed


def test_estimates_of_other_visits_or_worlds_are_refused(
    kept: Path, rooms: dict[str, np.ndarray], factors: WorldFactors, estimates: WorldFactors, tmp_path: Path
) -> None:
    config, visits = WorldConfig(USERS, DAYS, SEED), rooms["visit_id"]
    again = with_estimates(kept, config, visits, factors)
    assert np.array_equal(again.values, estimates.values)
    with pytest.raises(UserError, match="is about other rows"):
        with_estimates(kept, config, visits[::-1], factors)
    with pytest.raises(UserError, match="is about another world"):
        with_estimates(kept, config, visits, replace(factors, values=factors.values + 1))
    with pytest.raises(UserError, match="are of another world than"):
        estimated_factors.estimate(WorldConfig(USERS, DAYS, SEED + 1), visits, factors)
    (tmp_path / "bad.npz").write_bytes(b"no arrays")
    with pytest.raises(UserError, match="damaged, or no estimates"):
        with_estimates(tmp_path / "bad.npz", config, visits, factors)
