"""The benchmark of the start runs a real job to its first step, and the start loads only what the job needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import startup

NOT_NEEDED = (
    *("deepspeed", "transformers", "peft", "matplotlib", "tensorboard", "confluent_kafka", "redis", "pandas"),
    *("trainer.stream.sources.kafka_source", "trainer.stream.sources.message_codec", "trainer.data.importers"),
)
"""Modules that no batch job of a ranker needs before it has read its job file."""


def test_a_start_is_measured_and_loads_what_the_job_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The rank below imports the job; once is enough.
    monkeypatch.setattr(startup, "JOB_MODULE", "trainer.config.ranker")
    out = tmp_path / "startup.json"
    startup.main(["--repeats=1", "--users=20", "--fresh=0", f"--out={out}"])
    found = json.loads(out.read_text())
    assert list(found["stages"]) == list(startup.STAGES)
    assert all(stage["median"] > 0 for stage in found["stages"].values())
    total = sum(stage["median"] for stage in found["stages"].values())
    assert found["seconds_to_first_step"]["median"] == pytest.approx(total)
    assert {"pydantic", "trainer"} <= found["import_seconds_by_package"].keys()
    assert set(found["commands"]) == set(startup.COMMANDS)
    for name, command in found["commands"].items():
        assert not {"torch", "torchrec", "deepspeed", "pyarrow", "pandas"} & set(command["loaded"]), name
    assert "torch" in found["modules_loaded"] and "trainer.rank" in found["modules_loaded"]
    assert set(NOT_NEEDED).isdisjoint(found["modules_loaded"])
    printed = capsys.readouterr().out
    assert "stage until the first step" in printed and "package imported by trainer.rank" in printed


@pytest.mark.slow
def test_a_start_without_compiled_loops_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "JOB_MODULE", "trainer.config.ranker")
    monkeypatch.setattr(startup, "COMMANDS", {})
    out = tmp_path / "startup.json"
    startup.main(["--repeats=1", "--users=20", "--fresh=1", f"--out={out}"])
    found = json.loads(out.read_text())
    assert list(found["fresh"]["stages"]) == list(startup.STAGES)
    for start in (found, found["fresh"]):
        assert start["processor_seconds_to_first_step"]["median"] > found["processor_seconds_of_imports"]["median"] > 0
