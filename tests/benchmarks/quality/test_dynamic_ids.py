"""The stream of the benchmark is what it says, and its summary is arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import dynamic_ids
from benchmarks.quality.dynamic_ids import VARIANTS, summarise, table, table_of
from benchmarks.quality.dynamic_stream import PassingRooms
from benchmarks.speed.id_maps import one_order, ours, stream


def test_rooms_and_authors_pass() -> None:
    rooms = PassingRooms(seed=1, steps=120, rows=400, rooms=600, authors=150, life=8.0)
    steps = list(rooms)
    labels, probabilities = (
        np.concatenate([getattr(step, name) for step in steps]) for name in ("label", "probability")
    )
    deviation = np.sqrt((probabilities * (1 - probabilities)).sum())
    assert abs(labels.sum() - probabilities.sum()) < 4 * deviation
    early, late = ({*step.room.tolist()} for step in (steps[10], steps[110]))
    assert len(early) > 10 and not early & late
    author_of = {}
    for step in steps:
        for room, author in zip(step.room.tolist(), step.author.tolist(), strict=True):
            assert author_of.setdefault(room, author) == author
    assert len(set(author_of.values())) < len(author_of)


def test_the_summary_pairs_streams() -> None:
    aucs = {"all": [0.8, 0.9], "hash": [0.6, 0.5], "recency, after 2": [0.7, 0.8]}
    runs = [
        {
            "seed": seed,
            "variant": variant,
            "auc": value,
            "best_auc": 0.95,
            "learning_rate": 0.1,
            "rows": {"room": 10},
            "ids": {"room": {"unserved": 1, "looked_up": 4}} if "recency" in variant else {},
            "tables_ms": 2.0,
        }
        for variant, values in aucs.items()
        for seed, value in enumerate(values)
    ]
    summary = summarise(runs)
    assert summary["recency, after 2"]["minus_all"] == [pytest.approx(-0.1), pytest.approx(0)]
    assert summary["recency, after 2"]["minus_hash"][0] == pytest.approx(0.2)
    assert summary["recency, after 2"]["unserved"] == {"room": 0.25}
    assert "room 25.0 %" in table(summary)


def test_small_tables_have_a_tenth_of_the_rows() -> None:
    assert {variant: table_of("room", 500, variant).rows for variant in VARIANTS} == {
        variant: 501 if variant == "all" else 51 for variant in VARIANTS
    }


def test_one_bucket_of_all_rows_serves_as_many_as_one_order() -> None:
    maps = ours(41, 64), one_order(41)
    served = [0, 0]
    for step, ids in enumerate(stream(60, 30), 1):
        distinct, first = np.unique(ids.numpy(), return_index=True)
        for number, look_up in enumerate(maps):
            served[number] += int((look_up(ids, step).numpy()[first] >= 0).sum())
        assert len(distinct) > 10
    assert abs(served[0] - served[1]) <= 0.1 * served[1]


def test_a_small_run_and_again_nothing_to_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dynamic_ids, "RATES", (0.1, 0.2))
    out = tmp_path / "results" / "dynamic_ids.json"
    dynamic_ids.main(["--seeds=1", "--steps=12", f"--out={out}"])
    written = json.loads(out.read_text())
    assert [run["variant"] for run in written["runs"]] == list(VARIANTS)
    assert set(written["result"]) == {*VARIANTS, "best possible"}
    assert all(0.3 < run["auc"] < run["best_auc"] < 1 for run in written["runs"])
    assert written["result"]["hash"]["minus_hash"] == [0, None]
    assert "recency, after 2" in capsys.readouterr().out

    def refuse(*arguments: object) -> None:
        raise AssertionError("a run that is there is not repeated")

    monkeypatch.setattr(dynamic_ids, "train", refuse)
    dynamic_ids.main(["--seeds=1", "--steps=12", f"--out={out}"])
    assert json.loads(out.read_text())["runs"] == written["runs"]
