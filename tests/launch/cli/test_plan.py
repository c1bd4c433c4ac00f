"""``limelight plan``: the example of its help, JSON, files, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from tests.planning.planned_dataset import write_description

JOB = """[data]
path = "described"

[model]
expert_layers = [[16, 8]]

[train]
batch_size = 512
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Work in a directory with a job file and the description of its dataset, and return the job file's name."""
    monkeypatch.chdir(tmp_path)
    write_description(tmp_path / "described")
    (tmp_path / "job.toml").write_text(JOB)
    return "job.toml"


def test_a_plan_is_printed_as_json_and_written_to_a_directory(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", job, "--gpus", "4", "--gpu", "h100", "--hosts", "2", "--rows", "item=2_000_000"]
    assert main([*words, "--fill", "0.5", "--distinct", "0.2", "--mfu", "0.5", "--json", "--out", "planned"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("planned/plan.json").read_text())
    assert printed["assumptions"] == {
        "fill": 0.5,
        "distinct": 0.2,
        "mfu": 0.5,
        "ids": "spread evenly over the rows of a table",
    }
    assert printed["cluster"]["gpus"] == 4 and printed["cluster"]["hosts"] == 2
    (item,) = (table for table in printed["tables"] if table["table"] == "item")
    assert item["rows"] == 2_000_000
    assert "h100" in Path("planned/plan.txt").read_text()


def test_a_plan_is_a_table_and_an_override_counts(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--gpus", "1", "--gpu", "cpu", "train.batch_size=64"]) == 0
    out = capsys.readouterr().out
    assert "1 x cpu" in out and "rows/s with 64 rows a rank" in out and "limited by" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpu", "h2000"],
            "--gpu h2000: did you mean h200? known are h200, h100, a100-80, l40s, cpu; --gpu-file adds",
        ),
        (["--gpus", "6", "--hosts", "4"], "--gpus 6 cannot be divided equally among --hosts 4; use a multiple of 4"),
        (["--gpus", "0"], "0 is not in the range x>=1"),
        (["--rows", "item"], "'item': write TABLE=ROWS with 2 rows or more, such as item=2_000_000_000"),
        (["--rows", "item=1"], "'item=1': write TABLE=ROWS with 2 rows or more"),
        (["--rows", "room=9"], "--rows room: no such table; the job has user, author, item, side"),
        (["--fill", "0"], "0 is not in the range 0<x<=1"),
        (["--zipf", "5"], "5.0 is not in the range 0<=x<=4"),
        (["--zipf", "1", "--distinct", "0.1"], "--distinct and --zipf say different things about the ids of a step"),
        (
            ["--count-ids", "--rows", "item=9", "--fill", "0.5"],
            "--count-ids and --rows and --fill say different things",
        ),
        (["--gpu-file", "none.toml"], "none.toml: no such file of GPUs"),
        (["--gpus", "3"], "train.batch_size = 512 is not a multiple of the 3 ranks"),
        (["data.path=nowhere"], "nowhere: no dataset here (dataset.json is missing)"),
        (["train.epochs=0"], "train.epochs = 0: input should be greater than or equal to 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(job: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out
