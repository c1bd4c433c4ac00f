"""``limelight score`` and ``export``: what they do is decided by what is in the directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.cli.main import main

SECTIONS = {"ranker": "tables", "staytime": "lcu", "finetune": "lora", "foresight": "evaluate"}
"""A section that only the job of this kind has."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record what would be done, instead of doing it."""
    made: list[tuple[Any, ...]] = []

    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        made.append((module, *arguments, ranks))
        return 0

    def score_range(run: Path, out: Path, **options: Any) -> dict[str, Any]:
        print("a message of the work")
        made.append(("score_range", str(run), str(out), *options.values()))
        return {"all": {"rmse": 2.0, "rows": 3}, "exposures": {}, "constant": {}}

    def export_checkpoint(path: str, out: Path, data: str | None, *, with_dataset: bool) -> dict[str, Any]:
        made.append(("export_checkpoint", path, str(out), *([data, with_dataset] if data or with_dataset else [])))
        return {"kind": "ple", "step": 1200, "checkpoint": f"{path}/checkpoints/step-00001200"}

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    monkeypatch.setattr("trainer.comment_staytime.scoring.score_range", score_range)
    monkeypatch.setattr("trainer.serving.export.export_checkpoint", export_checkpoint)
    monkeypatch.setattr(
        "trainer.llm.models.adapter.merge_run", lambda run, out: made.append(("merge_run", str(run), str(out)))
    )
    return made


def directory_of(kind: str, parent: Path) -> str:
    """A directory as a job of this kind leaves it, as far as the kind can be told."""
    directory = parent / kind
    directory.mkdir()
    if kind == "export":
        (directory / "export.json").write_text("{}")
    if kind != "empty":
        section = SECTIONS.get(kind, "tables")
        (directory / "config.json").write_text(json.dumps({"run": {}, "data": {}, section: {}}))
    return str(directory)


@pytest.mark.parametrize("kind", ["ranker", "export"])
def test_a_ranker_scores_candidates(kind: str, tmp_path: Path, calls: list[Any]) -> None:
    model = directory_of(kind, tmp_path)
    assert main(["score", model, "candidates.parquet", "out.parquet"]) == 0
    assert calls == [("trainer.score", model, "candidates.parquet", "out.parquet", 1)]


def test_a_staytime_run_scores_visits(tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = directory_of("staytime", tmp_path)
    arguments = ["score", run, "out.parquet", "--from", "2024-03-10", "--until", "2024-03-11", "--data", "d"]
    assert main(arguments) == 0
    assert calls == [("score_range", run, "out.parquet", "d", "2024-03-10", "2024-03-11")]
    assert "predictions: out.parquet" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["all"] == {"rmse": 2.0, "rows": 3}
    assert "a message of the work" in printed.err


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("ranker", ["out.parquet"], "is a ranker, which takes two files: limelight score "),
        ("ranker", ["a", "b", "c"], "which takes two files"),
        ("export", ["out.parquet"], "which takes two files"),
        ("ranker", ["a", "b", "--from", "2024"], "--from is for a staytime run"),
        ("export", ["a", "b", "--json"], "--json is for a staytime run"),
        (
            "staytime",
            ["candidates.parquet", "out.parquet"],
            "is a staytime run, which takes one file: limelight score ",
        ),
        ("finetune", ["a", "b"], "a fine-tuning run scores nothing"),
        ("foresight", ["a", "b"], "a run of Foresight scores nothing; its metrics are in "),
        ("empty", ["a", "b"], "no run here (config.json is missing)"),
        ("empty", ["a"], "no run here (config.json is missing)"),
    ],
)
def test_score_with_arguments_of_another_kind(
    kind: str, arguments: list[str], told: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", directory_of(kind, tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and told in line and not calls


@pytest.mark.parametrize(
    ("kind", "function"),
    [("ranker", "export_checkpoint"), ("empty", "export_checkpoint"), ("finetune", "merge_run")],
)
def test_export_by_the_kind_of_run(
    kind: str, function: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory without settings may be a checkpoint; the export itself reports what is wrong with another one."""
    run = directory_of(kind, tmp_path)
    assert main(["export", run, "out"]) == 0
    assert calls == [(function, run, "out")]
    assert capsys.readouterr().out.startswith("out: ")
    assert main(["export", run, "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "out"


def test_a_dataset_is_named_and_carried_for_a_ranker_only(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ranker, finetune = directory_of("ranker", tmp_path), directory_of("finetune", tmp_path)
    assert main(["export", ranker, "out", "--data", "moved", "--with-dataset"]) == 0
    assert main(["score", ranker, "candidates.parquet", "out.parquet", "--data", "moved"]) == 0
    scored = ("trainer.score", ranker, "candidates.parquet", "out.parquet", "--data", "moved", 1)
    assert calls == [("export_checkpoint", ranker, "out", "moved", True), scored]
    for option in (["--with-dataset"], ["--data", "moved"]):
        assert main(["export", finetune, "out", *option]) == 2
        assert f"are for a ranker, and {finetune} is a fine-tuning run" in capsys.readouterr().err
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("staytime", "has nothing to export; its model is "),
        ("foresight", "has nothing to export; its predictor is in "),
        ("export", "is an exported model already"),
    ],
)
def test_export_of_what_has_no_export(
    kind: str, told: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", directory_of(kind, tmp_path), "out"]) == 2
    assert told in capsys.readouterr().err and not calls


@pytest.mark.parametrize("kind", ["export", "finetune", "staytime", "foresight"])
@pytest.mark.parametrize("command", [["evaluate"], ["explain", "--user", "1", "--candidate", "2"]], ids=" ".join)
def test_evaluate_and_explain_take_a_rankers_run(
    command: list[str], kind: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, directory_of(kind, tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"limelight {command[0]} takes a ranker's run, and this is a" in line and not calls


@pytest.mark.parametrize("command", ["score", "export"])
def test_settings_that_are_not_json(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert main([command, str(tmp_path), "out"]) == 2
    assert "config.json: not valid JSON" in capsys.readouterr().err
