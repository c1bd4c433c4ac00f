"""The benchmark of neighbours: what agreement means, and all of its parts at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import neighbours
from benchmarks.quality.neighbours import METHODS, TRUTHS, agreement, overlap


def test_agreement_is_the_cosine_of_neighbours_less_that_of_all_pairs() -> None:
    truth = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    near = [np.array([1]), np.array([0]), np.array([3]), np.array([], np.int64)]
    found = agreement(near, truth)
    # Of the three others, one has the cosine 1.
    assert found["mean"] == pytest.approx(1 - 1 / 3) and found["without"] == 1
    assert found["low"] <= found["mean"] <= found["high"]
    wrong = agreement([np.array([2, 3])] * 2, truth[:4])
    assert wrong["mean"] == pytest.approx(-1 / 3)
    assert agreement([np.array([], np.int64)] * 4, truth) == {"mean": None, "low": None, "high": None, "without": 4}
    assert overlap([np.array([1, 2]), np.array([], np.int64)], [np.array([2, 5])] * 2) == 0.5


def test_random_neighbours_agree_with_nothing() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((200, 5))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    found = agreement([rng.choice(200, 10, replace=False) for _ in truth], truth)
    assert found["low"] < 0.02 and found["high"] > -0.02 and abs(found["mean"]) < 0.03


def test_all_parts_run(
    limelight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        done = limelight(*map(str, arguments))
        assert done.status == 0, done.stdout + done.stderr

    monkeypatch.setattr(neighbours, "run_limelight", run)
    work, out = tmp_path / "work", tmp_path / "neighbours.json"
    arguments = ["--work", str(work), "--out", str(out), "--users", "80", "--days", "3", "--codes", "4"]
    arguments += ["--neighbours", "3", "train.epochs=1", "data.workers=0"]
    neighbours.main(arguments)
    assert "neighbours by" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert tuple(document["methods"]) == METHODS and document["authors"] > 20 and document["codes"] == 4
    for found in document["methods"].values():
        for truth in TRUTHS:
            assert found[truth]["low"] <= found[truth]["mean"] <= found[truth]["high"]
    # What authors show is what raw vectors are made of.
    assert document["methods"]["raw vectors"]["style"]["low"] > 0
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    neighbours.main(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}, "nothing twice"
