"""``limelight align``: what is started, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from tests.launch.cli.conftest import Started


@pytest.fixture
def started(recorded_starts: Started, tmp_path: Path) -> Started:
    """Record what would be started; the working directory has ``job.toml`` and the settings of two runs."""
    (tmp_path / "job.toml").write_text('[data]\npath = "nowhere"\n')
    for name, sections in (("run", {"towers": {}}), ("ranker", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"data": {"path": "nowhere"}, **sections}))
    return recorded_starts


@pytest.mark.parametrize("words", [["align"], ["align", "fit"]], ids=" ".join)
def test_a_job_file_in_place_of_a_command_is_trained(words: list[str], started: Started) -> None:
    assert main([*words, "job.toml", "towers.dim=8", "--ranks", "2"]) == 0
    assert started == [("trainer.align", ["job.toml", "towers.dim=8"], 2)]


def test_a_run_encodes_its_own_dataset_or_another_one(started: Started) -> None:
    assert main(["align", "encode", "run", "--out", "fused"]) == 0
    assert main(["align", "encode", "run", "data", "--out", "fused", "--vectors", "v", "--json", "--ranks", "2"]) == 0
    assert started == [
        ("trainer.encode_authors", ["run", "--out", "fused"], 1),
        ("trainer.encode_authors", ["run", "data", "--out", "fused", "--vectors", "v", "--json"], 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["align"], "missing command (limelight align --help"),
        (["align", "absent.toml"], "absent.toml: no such job file"),
        (["align", "job.toml", "towers.dims=8"], "unknown key towers.dims; did you mean towers.dim?"),
        (["align", "job.toml", "run.directory=s3://bucket/x"], "run.directory = s3://bucket/x: "),
        (["align", "encode", "run"], "missing option '--out'"),
        (["align", "encode", "nowhere", "--out", "x"], "nowhere: no run here"),
        (["align", "encode", "ranker", "--out", "x"], "ranker: not a run of limelight align"),
        (["evaluate", "run"], "limelight evaluate takes a ranker's run, and this is an alignment's run"),
        (["explain", "run", "--user", "1", "--candidate", "1"], "takes a ranker's run, and this is an alignment's"),
        (["score", "run", "out.parquet"], "an alignment scores no rows; limelight align encode writes"),
        (["export", "run", "out"], "an alignment has nothing to export; limelight align encode writes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_starts_nothing(
    arguments: list[str], told: str, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and told in line
    assert not started
