"""The benchmark of all systems: their jobs, what they are compared by, and all of its parts at a size of seconds."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from benchmarks.quality import full, kept_runs
from benchmarks.quality.attainable_bound import ATTAINABLE, VARIANTS
from benchmarks.quality.full import BASE_JOB, FULL_JOB, SECTIONS, FullWork, system_job
from benchmarks.quality.full_report import (
    BASE,
    BEST,
    CROSS,
    FORESIGHT,
    LARM,
    LOGISTIC,
    MOMENT,
    SYSTEMS,
    VECTORS,
    Bounds,
    SystemRun,
    summarise,
    tables,
)
from benchmarks.quality.full_tables import command_of, in_place, make_full_lines
from benchmarks.quality.larm_report import Scores
from trainer.config.load import read_job
from trainer.config.ranker import load_config

SMALL_TABLES = (
    "align:train.epochs=1",
    "align:towers.dim=8",
    "quantize:codebook.iterations=2",
    "foresight:train.epochs=1",
    "foresight:model.dim=8",
    "foresight:model.heads=2",
    "foresight:model.encoder_layers=1",
    "foresight:data.runs=8",
)


def test_every_input_of_the_full_job_belongs_to_one_system() -> None:
    raw = read_job(FULL_JOB)
    inputs = {f"features.{kind}.{name}" for kind in ("codes", "content") for name in raw["features"][kind]}
    inputs |= {"features.history", "features.search", "alignment", "stream", "labels"}
    named = [path for paths in SECTIONS.values() for path in paths]
    assert len(named) == len(set(named)) and inputs <= set(named)
    assert tuple(SECTIONS) == (CROSS, VECTORS, LARM, FORESIGHT, MOMENT) == SYSTEMS[2:]


def test_each_system_keeps_what_those_before_it_have(tmp_path: Path) -> None:
    jobs = {name: system_job(name, tmp_path, []) for name in SYSTEMS}
    base = load_config(BASE_JOB)
    assert jobs[BASE]["features"].keys() == jobs[LOGISTIC]["features"].keys() == {"history"}
    assert jobs[LOGISTIC]["model"] | {"kind": "ple"} == jobs[BASE]["model"] and base.model.kind == "ple"
    assert "stream" not in jobs[FORESIGHT] and {"stream", "labels"} == jobs[MOMENT].keys() - jobs[FORESIGHT].keys()
    assert len(jobs[CROSS]["features"]["history"]) == 5 and jobs[CROSS]["alignment"]["anchor"] == "mixed"
    assert set(jobs[VECTORS]["features"]["content"]) == {"room"} and "codes" not in jobs[VECTORS]["features"]
    assert set(jobs[LARM]["features"]["content"]) == {"room", "fused"} and set(jobs[LARM]["features"]["codes"]) == {
        "aligned"
    }
    last, whole = jobs[MOMENT]["features"], read_job(FULL_JOB)["features"]
    for kind in ("codes", "content"):
        assert last[kind].keys() == whole[kind].keys()
    assert last["codes"]["shown"]["file"] == f"{tmp_path}/data/full/codes-shown.parquet"
    assert last["content"]["encoded"]["table"] == f"{tmp_path}/runs/full/follow/forecasts/encoder"


def test_a_ranker_belongs_to_the_content_of_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_runs, "fingerprint", lambda path, spec: "world")
    monkeypatch.setattr(kept_runs.DatasetSpec, "load", lambda path: None)
    codes, table = tmp_path / "data/full/codes-shown.parquet", tmp_path / "data/full/world/embeddings/segments"
    codes.parent.mkdir(parents=True)
    table.mkdir(parents=True)

    def keys() -> dict[str, str]:
        options = Namespace(work=tmp_path, days=9, users=60, tables=[], overrides=[], finished=False)
        work = FullWork(options, Mock())
        return {name: work._key(name, 1) for name in SYSTEMS}

    codes.write_text("first")
    (table / "vectors").write_text("first")
    before = keys()
    assert keys() == before
    codes.write_text("second")
    after = keys()
    assert {name for name in SYSTEMS if after[name] != before[name]} == {FORESIGHT, MOMENT}
    (table / "vectors").write_text("second")
    assert {name for name in SYSTEMS if keys()[name] != after[name]} == {VECTORS, LARM, FORESIGHT, MOMENT}


def test_words_of_make_full_are_moved_to_another_place() -> None:
    work = Path("/other")
    assert in_place(work, "data.path=data/full/world") == "data.path=/other/data/full/world"
    assert in_place(work, "runs/full") == "/other/runs/full"
    assert in_place(work, "configs/full.toml") == "configs/full.toml" and in_place(work, "data/fuller") == "data/fuller"
    lines = make_full_lines("USERS=77")
    assert [command_of(line)[0] for line in lines].count("quantize") == 4 and "77" in command_of(lines[0])


def test_shares_are_between_logistic_regression_and_the_truth() -> None:
    rng, n = np.random.default_rng(1), 4000
    truth = rng.beta(1, 3, (n, 1)).astype(np.float32)
    label = (rng.random((n, 1)) < truth).astype(np.float32)
    user, visit, mask = rng.integers(0, 80, n), np.arange(n), np.ones_like(label)

    def near(noise: float, seed: int) -> np.ndarray:
        error = noise * np.random.default_rng(seed).standard_normal((n, 1))
        return (1 / (1 + np.exp(-np.log(truth / (1 - truth)) - error))).astype(np.float32)

    noises = dict(zip(SYSTEMS, (3, 2.5, 2, 1.6, 1.3, 1.0, 0.7), strict=True))
    seeds = [
        {
            name: SystemRun(
                Scores(("click",), user, visit, near(noise, seed), label, mask, 0.0), 100, 2.0, 10 * (noise < 2.5), 1.0
            )
            for name, noise in noises.items()
        }
        for seed in (1, 2)
    ]
    hidden = {name: near(0.3, 9) for name in VARIANTS}
    result = summarise(seeds, Bounds(truth, hidden))
    found = result["behaviours"]["click"]
    for metric in ("auc", "gauc"):
        shares = [found[metric]["systems"][name]["gap_closed"][0] for name in SYSTEMS]
        assert shares[0] == pytest.approx(0) and shares == sorted(shares)
        assert shares[-1] < found[metric]["attainable_share"] < 1
        assert found[metric]["bounds"][BEST] > found[metric]["bounds"][ATTAINABLE]
        pairs = {(one["system"], one["to"]): one for one in found[metric]["differences"]}
        assert set(pairs) == {*zip(SYSTEMS[1:], SYSTEMS, strict=False), (FORESIGHT, BASE), (MOMENT, BASE)}
        assert pairs[MOMENT, BASE]["low"] > 0 and len(pairs[MOMENT, BASE]["seeds"]) == 2
    assert result["speed"][BASE]["rows_per_second"][0] == 50
    assert "attainable" in tables(result) and "+ Foresight" in tables(result)
    assert found["above_attainable"] == [] and "too low" not in tables(result)
    # A bound that a model exceeds by more than the noise is no bound.
    low = summarise(seeds, Bounds(truth, {**hidden, ATTAINABLE: near(1.5, 8)}))
    assert {MOMENT} <= set(low["behaviours"]["click"]["above_attainable"]) < set(SYSTEMS)
    assert "above the attainable bound, which is too low" in tables(low)


@pytest.mark.slow
def test_all_parts_run(
    limelight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        done = limelight(*map(str, arguments))
        assert done.status == 0, done.stdout + done.stderr

    monkeypatch.setattr(full, "run_limelight", run)
    work, out = tmp_path / "work", tmp_path / "full.json"
    arguments = ["--work", str(work), "--out", str(out), "--users", "60", "--days", "5"]
    arguments += ["--tables", *SMALL_TABLES]
    small = ["model.expert_layers=[[8],[8]]", "model.tower=[8]"]
    with pytest.raises(SystemExit):
        full.main([*small, *arguments, "--seeds", "1", "--finished"])
    full.main([*small, *arguments, "--seeds", "1"])
    printed = capsys.readouterr().out
    assert "of the gap" in printed and "best possible" in printed and "+ LARM" in printed
    document = json.loads(out.read_text())
    assert document["seeds"] == 1 and len(document["behaviours"]) == 7
    click = document["behaviours"]["click"]["auc"]
    assert set(click["systems"]) == set(SYSTEMS) and set(click["bounds"]) == {BEST, *VARIANTS}
    assert 0.6 < click["bounds"][BEST] < 1 and document["speed"][MOMENT]["stream_rows_per_second"][0] > 0
    assert document["speed"][FORESIGHT]["stream_rows_per_second"] == [None, None]
    assert out.with_suffix(".png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    # Of a benchmark that was stopped, the finished seeds are reported: here the only one of two.
    full.main([*small, *arguments, "--seeds", "1", "2", "--finished"])
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}, "nothing twice"
    assert json.loads(out.read_text())["behaviours"] == document["behaviours"]
    with pytest.raises(SystemExit):
        full.main(["--days", "4"])
    assert "--days: 4" in capsys.readouterr().err
