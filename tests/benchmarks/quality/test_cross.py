"""The benchmark of Cross: its variants are jobs, its differences are paired by seed, a run is done once."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import cross, kept_runs
from benchmarks.quality.cross_report import (
    FULL,
    GROUPS,
    NO_VIDEOS,
    WITHOUT_CROSS,
    Figures,
    VariantResult,
    draw,
    summarise,
    tables,
    with_interval,
)
from trainer.config.ranker import JobConfig
from trainer.data.simulator.cross.write_dataset import simulate_cross
from trainer.runtime.distributed import World

SEARCHES = {"short", "long", "author", "live_long", "mixed"}


def test_a_variant_changes_one_thing(tmp_path: Path) -> None:
    jobs = {variant: cross.job_of(variant, tmp_path, 7) for variant in cross.VARIANTS}
    full = jobs[FULL]
    assert set(full.features.history) == SEARCHES and full.model.kind == "ple" and full.alignment.anchor == "mixed"
    assert {job.run.seed for job in jobs.values()} == {7}
    for name in SEARCHES:
        assert set(jobs[f"no {name}"].features.history) == SEARCHES - {name}
        assert jobs[f"no {name}"].alignment.anchor == ("" if name == "mixed" else "mixed")
    assert jobs["CGC"].model.kind == "cgc" and jobs["CGC"].features == full.features
    assert jobs[WITHOUT_CROSS].model.kind == "cgc" and not jobs[WITHOUT_CROSS].features.history
    assert jobs["no alignment"].features == full.features and not jobs["no alignment"].alignment.anchor
    assert {history.domain for history in jobs[NO_VIDEOS].features.history.values()} == {"live"}
    for job in jobs.values():
        assert (job.optimizer, job.train, job.data) == (full.optimizer, full.train, full.data)


def figures(auc: float | None) -> Figures:
    of_click = {"auc": auc, "gauc": auc, "best_auc": 0.9, "best_gauc": 0.8, "positives": 5, "rows": 50}
    return {group: {"click": of_click} for group in ("all", *GROUPS)}


def test_differences_are_of_the_same_seed(tmp_path: Path) -> None:
    full = {1: 0.70, 2: 0.74, 3: 0.72}
    lost = {1: 0.01, 2: 0.02, 3: 0.03}
    runs = [VariantResult(FULL, seed, 1.0, figures(auc)) for seed, auc in full.items()]
    runs += [VariantResult("CGC", seed, 1.0, figures(full[seed] - lost[seed])) for seed in (3, 1, 2)]
    # A seed whose full model is not done is left out, and so is what is undefined.
    runs += [VariantResult("CGC", 4, 1.0, figures(0.1)), VariantResult(NO_VIDEOS, 1, 1.0, figures(None))]
    result = summarise(runs, [FULL, "CGC", NO_VIDEOS])
    click = result["table_2"]["click"]
    assert click["best_auc"] == pytest.approx(90) and click[FULL]["auc"]["mean"] == pytest.approx(72)
    found = click["difference"]["CGC"]["auc"]
    assert (found["mean"], found["seeds"]) == (pytest.approx(-2), 3)
    # Student's t with two degrees of freedom, standard deviation 1.
    assert found["half_width_95"] == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
    assert result["table_4"]["click"]["low"] == {"mean": None, "half_width_95": None, "seeds": 0}
    text = tables(result)
    assert "-2.00 ±2.48" in text and "72.00" in text and "best possible" in text
    draw(result, tmp_path / "picture.svg")
    panels = (tmp_path / "picture.svg").read_text().count('id="axes_')
    assert panels == 2, "one of variants and one of groups of users, for the one behaviour"


def test_interval_of_one_seed_is_none() -> None:
    assert with_interval([2.0]) == {"mean": 2.0, "half_width_95": None, "seeds": 1}


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the content of the dataset, which can be changed; none is read."""
    content = ["first"]
    monkeypatch.setattr(kept_runs, "fingerprint", lambda path, spec: content[0])
    monkeypatch.setattr(kept_runs.DatasetSpec, "load", lambda path: None)
    return content


def test_a_run_is_done_once_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dataset: list[str]
) -> None:
    done: list[tuple[str, int]] = []

    def fake(config: object, variant: str, world: World) -> VariantResult:
        seed = config.run.seed  # type: ignore[attr-defined]
        done.append((variant, seed))
        return VariantResult(variant, seed, 1.0, figures(0.7))

    monkeypatch.setattr(cross, "run", fake)
    monkeypatch.setattr(cross, "VARIANTS", {FULL: {}, "CGC": {"model.kind": "cgc"}})
    path = tmp_path / "world"
    options = argparse.Namespace(work=tmp_path, seeds=[1, 2], minutes=0.0, variants=[FULL, "CGC"])
    cross.run_missing(options, path)
    assert done == [], "there was no time for any"
    options.minutes = 9.0
    cross.run_missing(argparse.Namespace(**{**vars(options), "seeds": [1], "variants": [FULL]}), path)
    cross.run_missing(options, path)
    assert done == [(FULL, 1), ("CGC", 1), (FULL, 2), ("CGC", 2)]
    cross.run_missing(options, path)
    assert len(done) == 4 and len(cross.kept_results(tmp_path, path)) == 4
    # A variant that means another job now, and a world that is another one, are measured again.
    monkeypatch.setattr(cross, "VARIANTS", {FULL: {}, "CGC": {"model.kind": "mmoe"}})
    assert {one.variant for one in cross.kept_results(tmp_path, path)} == {FULL}
    cross.run_missing(options, path)
    assert done[4:] == [("CGC", 1), ("CGC", 2)]
    dataset[0] = "second"
    assert cross.kept_results(tmp_path, path) == []
    assert "of another job or world than those of this version; left out" in capsys.readouterr().err
    cross.run_missing(options, path)
    assert len(done) == 10


def test_main_writes_the_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: list[str]
) -> None:
    def fake(config: JobConfig, variant: str, world: World) -> VariantResult:
        return VariantResult(variant, config.run.seed, 2.0, figures(0.7 if variant == FULL else 0.6))

    monkeypatch.setattr(cross, "run", fake)
    monkeypatch.setattr(cross, "simulate_cross", lambda path, *size: path.mkdir())
    out = tmp_path / "results" / "cross.json"
    options = ["--seeds", "1", "2", f"--out={out}", f"--work={tmp_path / 'work'}", "--users=8"]
    with pytest.raises(SystemExit, match="no run of the full model is finished yet"):
        cross.main([*options, "--minutes=0"])
    cross.main(options)
    written = json.loads(out.read_text())
    assert (written["runs"], written["mean_cpu_seconds_of_a_run"]) == (2 * len(cross.VARIANTS), 2.0)
    assert written["world"] == {"users": 8, "days": 60, "seed": 1}
    assert written["table_2"]["click"]["difference"]["no long"]["auc"]["mean"] == pytest.approx(-10)
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "AUC, no short videos, by activity" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    simulate_cross(tmp_path / "world", users=8, days=60, partitions=2, seed=3)
    with World.join("cpu") as world:
        measured = cross.run(cross.job_of(NO_VIDEOS, tmp_path / "world", 1), NO_VIDEOS, world)
    rows = [measured.groups[group]["click"]["rows"] for group in ("all", *GROUPS)]
    assert rows[0] == sum(rows[1:]) > 100
    click = measured.groups["all"]["click"]
    assert click["auc"] is not None and click["best_auc"] is not None and 0.4 < click["auc"] < click["best_auc"] < 1
