"""``limelight runs``: the words, and what is printed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.cli.main import main
from tests.launch.cli.parsing import parse


@pytest.mark.parametrize("line", ["", "d", "list d", "--json", "--sort auc", "d --json"])
def test_a_directory_stands_for_the_list(line: str) -> None:
    context = parse(f"limelight runs {line}")
    assert context.command_path == "limelight runs list"
    assert context.params["directory"] == ("d" if "d" in line.split() else "runs")


def test_the_runs_of_an_earlier_version_are_listed(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stored)
    assert main(["runs", "."]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:3] for line in printed[1:] if line and ":" not in line}
    assert rows == {
        "batch": ["train", "finished"],
        "finetune": ["finetune", "stopped"],
        "staytime": ["staytime", "finished"],
        "stream": ["train", "stopped"],
    }
    assert main(["runs", ".", "--json", "--sort", "steps"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["directory"] for run in found[:1]] == ["stream"] and found[0]["steps"] == 28


def test_a_page_about_several_runs_needs_a_name(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(stored / "batch"), str(stored / "staytime")]
    assert main(["report", *runs]) == 2
    assert "needs --out FILE" in capsys.readouterr().err
    page = stored / "page.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"report: {page}\n" and "staytime" in page.read_text()
    page.unlink()
    assert main(["runs", "compare", *runs]) == 0
    assert f"B: {runs[1]}" in capsys.readouterr().out
    assert main(["report", str(stored)]) == 2
    assert capsys.readouterr().err == f"limelight: error: {stored}: no run here, and no codebook\n"


def test_without_runs_the_answer_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert capsys.readouterr().err == "limelight: error: runs: no such directory\n"
    os.mkdir("runs")
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "runs: no runs here\n"
