"""``limelight foresight``: what is started, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from tests.launch.cli.conftest import Started


@pytest.fixture
def started(recorded_starts: Started, tmp_path: Path) -> Started:
    """Record what would be started; the working directory has ``job.toml`` and the settings of two runs."""
    (tmp_path / "job.toml").write_text('[data]\npath = "nowhere"\ncodes = "c"\ncodebook = "b"\n')
    settings = {"data": {"path": "nowhere", "codes": "c", "codebook": "b"}}
    for name, config in (("run", settings), ("ranker", {"data": {"path": "nowhere"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return recorded_starts


@pytest.mark.parametrize("words", [["foresight"], ["foresight", "fit"]], ids=" ".join)
def test_a_job_file_in_place_of_a_command_is_trained(words: list[str], started: Started) -> None:
    assert main([*words, "job.toml", "model.dim=8", "--ranks", "2"]) == 0
    assert started == [("trainer.foresight", ["job.toml", "model.dim=8"], 2)]


def test_following_is_started_with_its_job_file(started: Started) -> None:
    assert main(["foresight", "follow", "job.toml", "follow.tick_seconds=60", "--ranks", "2"]) == 0
    assert started == [("trainer.foresight_follow", ["job.toml", "follow.tick_seconds=60"], 2)]


def test_a_run_forecasts_its_own_codes_or_others(started: Started) -> None:
    assert main(["foresight", "forecast", "run", "--out", "f"]) == 0
    options = ["--codes", "c.parquet", "--from", "2024-03-09", "--all", "--pooling", "last", "--json"]
    assert main(["foresight", "forecast", "run", "--out", "f", *options, "--ranks", "2"]) == 0
    assert started == [
        ("trainer.forecast", ["run", "--out", "f", "--pooling", "mean"], 1),
        ("trainer.forecast", ["run", "--out", "f", *options], 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["foresight"], "missing command (limelight foresight --help"),
        (["foresight", "absent.toml"], "absent.toml: no such job file"),
        (["foresight", "job.toml", "model.dims=8"], "unknown key model.dims; did you mean model.dim?"),
        (
            ["foresight", "follow", "job.toml", "follow.tick_second=3"],
            "unknown key follow.tick_second; did you mean follow.tick_s",
        ),
        (["foresight", "follow", "job.toml", "follow.tick_seconds=0"], "follow.tick_seconds = 0: "),
        (["foresight", "forecast", "run"], "missing option '--out'"),
        (["foresight", "forecast", "nowhere", "--out", "x"], "nowhere: no run here"),
        (["foresight", "forecast", "ranker", "--out", "x"], "ranker: not a run of limelight foresight"),
        (["foresight", "forecast", "run", "--out", "x", "--pooling", "sum"], "'sum' is not one of 'mean', 'last'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_starts_nothing(
    arguments: list[str], message: str, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and message in line
    assert not started
