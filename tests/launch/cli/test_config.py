"""``limelight config KIND``: the reference of each kind of job file, as tables and as a JSON Schema."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest

from launch.cli.config import JOBS
from launch.cli.main import main
from launch.config_check import job_model
from tests.paths import ROOT
from trainer.config.reference import reference


@pytest.mark.parametrize("kind", [*JOBS, "rank"])
def test_the_reference_of_a_job_file(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", kind]) == 0
    printed = capsys.readouterr().out
    assert printed == reference(job_model("train" if kind == "rank" else kind)) + "\n"
    assert "**`[data]`**" in printed and "| key | type | default | meaning |" in printed


@pytest.mark.parametrize("kind", JOBS)
def test_the_schema_has_every_section(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", kind, "--json"]) == 0
    schema: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(job_model(kind).model_fields)
    file = {"train": "simulated", "finetune": "finetune_small"}.get(kind, kind)
    job = tomllib.loads((ROOT / "configs" / f"{file}.toml").read_text())
    assert set(job) <= set(schema["properties"])
