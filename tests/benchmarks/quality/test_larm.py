"""The benchmark of LARM: its groups of authors, its tables, and all of its parts at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import slug
from benchmarks.quality import larm, larm_report
from benchmarks.quality.larm_report import (
    CODES,
    FEATURES,
    FUSED,
    GROUPS,
    IDS,
    NEW,
    QUARTERS,
    RAW,
    AuthorGroups,
    Scores,
    cell,
    ranking_result,
)
from trainer.checkpoint.run_directory import load_align_run


def test_authors_are_in_quarters_and_the_others_are_new() -> None:
    groups = AuthorGroups(np.array([2, 5, 7, 9]), np.array([3, 0, 1, 2]))
    found = [GROUPS[place] for place in groups.of(np.array([5, 2, 4, 9, 100, 0]))]
    assert found == [QUARTERS[0], QUARTERS[3], NEW, QUARTERS[2], NEW, NEW]


def test_scores_are_kept_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    columns = [rng.random((5, 2), np.float32) for _ in range(3)]
    scores = Scores(("click", "gift"), np.arange(5), np.arange(5) + 7, *columns, seconds=1.5)
    scores.write(tmp_path / "scores.npz")
    found = Scores.read(tmp_path / "scores.npz")
    assert (found.behaviours, found.seconds) == (scores.behaviours, 1.5)
    for name in ("user_id", "visit_id", "probability", "label", "mask"):
        assert np.array_equal(getattr(found, name), getattr(scores, name))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_a_better_ranker_is_found_in_the_group_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, n = np.random.default_rng(2), 4000
    author = rng.integers(0, 8, n)
    label = (rng.random((n, 1)) < 0.3).astype(np.float32)
    base = rng.random((n, 1)).astype(np.float32)
    # Authors 0 and 1 are the rarest quarter; only their rows are predicted better.
    better = np.where((author < 2)[:, None], base + 0.5 * label, base)
    monkeypatch.setattr(larm_report, "author_of_visits", lambda world, visits: author)
    groups = AuthorGroups(np.arange(8), np.arange(8) // 2)

    def scores(probability: np.ndarray) -> Scores:
        return Scores(("click",), rng_user, np.arange(n), probability, label, np.ones_like(label), 0.0)

    rng_user = rng.integers(0, 60, n)
    result = ranking_result({IDS: [scores(base)] * 2, RAW: [scores(better)] * 2}, groups, Path())["click"]
    for name in GROUPS:
        (difference,) = result[name]["auc"]["differences"]
        if name == NEW:
            assert result[name]["rows"] == 0 and cell(difference) == "-"
        elif name == QUARTERS[0]:
            assert difference["low"] > 10 and (difference["variant"], difference["to"]) == (RAW, IDS)
        elif name in QUARTERS:
            assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)


def test_all_parts_run(
    limelight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        done = limelight(*map(str, arguments))
        assert done.status == 0, done.stdout + done.stderr

    monkeypatch.setattr(larm, "run_limelight", run)
    monkeypatch.setattr(larm, "TOWERS", {name: larm.TOWERS[name] for name in (FEATURES, FUSED)})
    work, out = tmp_path / "work", tmp_path / "larm.json"
    arguments = ["--work", str(work), "--out", str(out), "--users", "80", "--days", "4", "--seeds", "1"]
    arguments += ["--levels", "4", "4", "--rankers", IDS, RAW, CODES, "--towers", "train.epochs=1"]
    small = ["model.expert_layers=[[8],[8]]", "model.tower=[8]", "data.workers=0"]
    larm.main([*small, *arguments])
    printed = capsys.readouterr().out
    assert "Recall@1, %" in printed and "click, AUC" in printed and RAW in printed
    document = json.loads(out.read_text())
    assert set(document["ranking"]) == {"click", "long_view", "gift", "follow"} and document["levels"] == [4, 4]
    assert document["towers"] == ["train.epochs=1"]
    trained = load_align_run(work / "seed-1" / "towers-fused")
    assert (trained.train.epochs, trained.towers.author) == (1, "fused")
    assert document["retrieval"]["all"]["pairs"] > 0 and out.with_suffix(".png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    larm.main([*small, *arguments])
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}, "nothing twice"
    # A ranker whose settings are others in this version is trained again, and no other.
    monkeypatch.setitem(larm.RANKERS, RAW, [*larm.RANKERS[RAW], "features.smoothing=5.0"])
    larm.main([*small, *arguments])
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {f"ranker-{slug(RAW)}{suffix}" for suffix in (".json", ".npz")}
    document = json.loads(out.read_text())
    only = tmp_path / "larm_on_air.json"
    larm.main([*small, "--retrieval-only", *(str(only) if word == str(out) else word for word in arguments)])
    found = json.loads(only.read_text())
    assert found["retrieval"] == document["retrieval"] and "ranking" not in found and found["load"]
    assert "AUC" not in capsys.readouterr().out.rpartition("Recall@1, %")[2]
    with pytest.raises(SystemExit):
        larm.main(["--days", "2", "--held-out-days", "2"])
    assert "2 of 2 days; leave a day to train on" in capsys.readouterr().err
