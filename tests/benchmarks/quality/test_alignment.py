"""The benchmark of alignment: its rankers differ in the loss only, its groups share the rows, and main measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import alignment
from benchmarks.quality.alignment import RANKERS, TRIED, TUNED, VARIANTS, WORLDS, groups_of, job_of, live_visits_before
from benchmarks.quality.alignment_report import ALIGNED, ALL, FEW, GROUPS, MANY, NO_VIDEOS, NONE, tables
from benchmarks.quality.kept_runs import run_file
from benchmarks.quality.recipe import HELD_OUT, TUNING
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import read_rows
from trainer.data.simulator.config import DAY_MS, START_MS
from trainer.data.simulator.write_dataset import simulate

SMALL = ["model.expert_layers=[[4]]", "model.tower=[4]", "model.attention=[4]", "train.batch_size=64"]
SMALL += ["model.compiled_attention=false", "model.compiled_experts=false"]


def test_rankers_differ_in_the_loss_or_in_the_videos_only() -> None:
    none, aligned, alone = (job_of(name, HELD_OUT, 3, Path("world")) for name in (NONE, ALIGNED, NO_VIDEOS))
    assert not none.alignment.anchor and aligned.alignment.anchor == "mixed"
    assert set(none.features.history) == {"short", "author", "live", "mixed"}
    off = aligned.alignment.model_copy(update=none.alignment.model_dump())
    assert aligned.model_copy(update={"alignment": off}) == none
    assert {history.domain for history in alone.features.history.values()} == {"live"}
    for section in ("model", "optimizer", "tables", "train", "data"):
        assert getattr(alone, section) == getattr(none, section), section
    for days, rankers in RANKERS.items():
        for name, found in rankers.items():
            assert found.than in ("", *rankers)
            assert not found.than or job_of(name, days, 1, Path("w")) != job_of(found.than, days, 1, Path("w"))


def test_settings_are_chosen_on_days_before_the_reported_ones() -> None:
    tuning, held_out = (job_of(NONE, days, 1, Path("world")).data for days in (TUNING, HELD_OUT))
    assert tuning.eval_from < tuning.eval_until == held_out.eval_from
    chosen = job_of(ALIGNED, HELD_OUT, 1, Path("world")).alignment
    assert (chosen.weight, chosen.temperature) in TRIED and len(TUNED) > len(TRIED)


def test_groups_have_half_of_the_rows_each() -> None:
    visits = np.random.default_rng(1).integers(0, 300, 999)
    groups = groups_of(visits)
    assert tuple(groups) == GROUPS and groups[ALL].all()
    assert np.array_equal(groups[FEW], ~groups[MANY]) and visits[groups[FEW]].max() < visits[groups[MANY]].min()
    assert 0.48 < groups[FEW].mean() <= 0.5
    # A user with most of the rows is not cut in two.
    assert groups_of(np.array([1, 5, 5, 5, 9]))[FEW].tolist() == [True, False, False, False, False]


def test_visits_after_the_beginning_of_the_days_do_not_count(tmp_path: Path) -> None:
    simulate(tmp_path / "world", 20, 8, 2, 5)
    rows = read_rows(tmp_path / "world", DatasetSpec.load(tmp_path / "world"), columns=["user_id", "emit_ms"])
    users = np.arange(20)
    before = {TUNING: START_MS + 6 * DAY_MS, HELD_OUT: START_MS + 8 * DAY_MS}
    for days, end in before.items():
        wanted = [int(((rows["user_id"] == user) & (rows["emit_ms"] < end)).sum()) for user in users]
        assert live_visits_before(tmp_path / "world", days, users).tolist() == wanted


def test_main_trains_once_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alignment, "COMMON", (*alignment.COMMON, *SMALL))
    few = {NONE: TUNED[NONE]}
    monkeypatch.setattr(alignment, "RANKERS", {TUNING: few, HELD_OUT: VARIANTS})
    out, work = tmp_path / "alignment.json", tmp_path / "work"
    arguments = ["--work", str(work), "--out", str(out), "--users", "30"]
    alignment.main([*arguments, "--worlds", "0", "--seeds", "1", "--tuning-seeds", "1"])
    result: dict[str, Any] = json.loads(out.read_text())
    assert list(result["worlds"]) == ["0"] and abs(result["worlds"]["0"]["correlation"]) < 0.2
    groups = result["worlds"]["0"]["groups"]
    assert groups[FEW]["live_visits"] < groups[ALL]["live_visits"] < groups[MANY]["live_visits"]
    assert groups[FEW]["users"] + groups[MANY]["users"] == groups[ALL]["users"]
    click = groups[ALL]["behaviours"]["click"]
    assert click["rows"] == sum(groups[name]["behaviours"]["click"]["rows"] for name in (FEW, MANY))
    assert 0.6 < click["best_auc"] < 1 and set(click["recipes"]) == set(VARIANTS)
    difference = click["recipes"][ALIGNED]["auc_difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"] and len(difference["seeds"]) == 1
    assert set(result["tuning"]["recipes"]) == set(few)
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr()
    assert "alignment less no alignment, AUC, points" in printed.out and printed.err.count(", seed 1\n") == 4
    assert tables(result) in printed.out

    # What is there is not trained again, and a world that is missing is made.
    kept = run_file(work / "held-out" / "0", 1, NONE).stat().st_mtime_ns
    monkeypatch.setattr(alignment, "RANKERS", {TUNING: few, HELD_OUT: {NONE: VARIANTS[NONE]}})
    alignment.main([*arguments, "--days", HELD_OUT, "--worlds", "0", "default", "--seeds", "1"])
    assert run_file(work / "held-out" / "0", 1, NONE).stat().st_mtime_ns == kept
    assert list(json.loads(out.read_text())["worlds"]) == ["0", "default"]
    assert WORLDS["default"] is None and "interest_correlation" not in DatasetSpec.load(work / "world-default").extra
