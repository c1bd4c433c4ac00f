"""Runs side by side: paired intervals, common rows, and settings that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.stored_runs import ROWS, held_out_rows, write_ranker, write_rows
from trainer.console.errors import UserError
from trainer.report.compare import RunComparison, compare_runs, format_comparison


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    return str(write_ranker(tmp_path / "a", 0.05)), str(write_ranker(tmp_path / "b", 0.5, dropout=0.5))


def line(comparison: RunComparison, name: str) -> tuple[list[float | None], list[float | None]]:
    """Return the values of a metric, and the first difference with its interval."""
    (found,) = (one for one in comparison.metrics if one.name == name)
    return found.values, list(vars(found.differences[0]).values()) if found.differences else []


def test_a_worse_run_is_worse_beyond_its_interval(runs: tuple[str, str]) -> None:
    comparison = compare_runs(runs)
    (first, second), (value, low, high) = line(comparison, "click.auc")
    assert first is not None and second is not None and value == pytest.approx(second - first)
    assert low is not None and high is not None and low < value < high < 0
    assert comparison.settings == {"model.dropout": [0.0, 0.5]}
    text = format_comparison(comparison)
    assert f"A: {runs[0]}" in text and f"{value:+.4f} ({low:+.4f}, {high:+.4f})*" in text
    assert f"on the {ROWS:,} held-out rows" in text and "model.dropout  0.0  0.5" in text
    assert json.loads(json.dumps(comparison.document()))["metrics"][0]["name"] == "click.auc"


def test_a_run_and_itself_do_not_differ(runs: tuple[str, str]) -> None:
    comparison = compare_runs([runs[0], runs[0], runs[1]])
    assert all(vars(one.differences[0]) == {"value": 0.0, "low": 0.0, "high": 0.0} for one in comparison.metrics)
    assert len(comparison.metrics[0].differences) == 2


def test_rows_that_are_in_one_run_only_are_left_out_and_said(runs: tuple[str, str]) -> None:
    columns = held_out_rows(0.05)
    (whole, _), _ = line(compare_runs([runs[0], runs[0]]), "click.auc")
    # The other order shows that rows are matched by their visit.
    write_rows(Path(runs[1]), {name: column[99::-1] for name, column in columns.items()})
    comparison = compare_runs(runs)
    (first, second), (value, _, _) = line(comparison, "click.auc")
    assert value == 0.0 and first == second != whole
    assert any(
        f"on the 100 rows that are in all of them ({ROWS:,} of {runs[0]}, 100 of" in note for note in comparison.notes
    )
    write_rows(Path(runs[1]), columns | {"visit_id": columns["visit_id"] + 1})
    comparison = compare_runs(runs)
    assert any("no common row" in note for note in comparison.notes)
    assert line(comparison, "click.auc") == ([whole, comparison.metrics[0].values[1]], [])


def test_other_labels_or_behaviours_are_not_compared(runs: tuple[str, str]) -> None:
    columns = held_out_rows(0.05)
    columns["label_gift"] = 1 - columns["label_gift"]
    write_rows(Path(runs[1]), columns)
    comparison = compare_runs(runs)
    assert {one.name for one in comparison.metrics} == {"click.auc", "click.gauc"}
    assert any(note.startswith("gift: the runs have other labels") for note in comparison.notes)
    write_rows(Path(runs[1]), held_out_rows(0.05, behaviours=("like",)))
    assert any("no common behaviour" in note for note in compare_runs(runs).notes)
    write_rows(Path(runs[1]), columns | {"visit_id": columns["visit_id"] // 6})
    assert any("a visit twice" in note for note in compare_runs(runs).notes)


def test_a_baseline_has_the_job_of_its_run(runs: tuple[str, str]) -> None:
    comparison = compare_runs([runs[0], f"{runs[0]}/baselines/logistic"])
    assert comparison.settings == {"model.kind": ["mmoe", "logistic"]}
    assert line(comparison, "click.auc")[1]


def test_runs_of_other_kinds_have_their_metrics_side_by_side(runs: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "lock").touch()
    (tmp_path / "c" / "config.json").write_text("{")
    comparison = compare_runs([runs[0], str(tmp_path / "c")])
    assert comparison.metrics[0].values[1] is None and not comparison.metrics[0].differences
    assert any("damaged" in note for note in comparison.notes)
    assert f"{tmp_path}/c: damaged, and has no metrics yet" in comparison.notes
    assert any("settings are not compared" in note for note in comparison.notes)
    assert "B: " in format_comparison(comparison)


def test_a_comparison_needs_two_runs(runs: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        compare_runs(runs[:1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, words in (
        ("nowhere", "no run here, there is no such directory"),
        ("empty", "no run here, the directory is empty"),
        ("file", "no run here, but a file; name the directory of a run"),
        (".", "no run here"),
    ):
        with pytest.raises(UserError, match=f": {words}$"):
            compare_runs([runs[0], str(tmp_path / name)])
