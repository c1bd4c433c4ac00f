"""Plans of job files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.plan_job import plan_job, write_plan
from tests.planning.test_plan_text import RANKER
from trainer.console.errors import UserError
from trainer.planning.accelerators import describe_cluster

OPTIONS: dict[str, Any] = {
    "rows": {},
    "fill": 1.0,
    "distinct": None,
    "zipf": None,
    "count": False,
    "answers": 1.0,
    "mfu": None,
}


def test_other_jobs_are_refused_with_the_command_that_they_are_for() -> None:
    with pytest.raises(UserError, match=r"is a job of limelight quantize; limelight plan plans those of train and"):
        plan_job("configs/quantize.toml", [], describe_cluster("cpu", 1, 1), **OPTIONS)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"rows": {"item": 5}}, "--rows item"),
        ({"count": True}, "--count-ids"),
        ({"distinct": 0.5}, "--distinct"),
        ({"zipf": 0.0}, "--zipf"),
    ],
)
def test_a_fine_tuning_job_has_no_tables(given: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=f"^{option}: a fine-tuning job has no tables$"):
        plan_job("configs/qwen2_7b_lora.toml", [], describe_cluster("cpu", 1, 1), **{**OPTIONS, **given})


def test_the_files_of_a_plan_replace_earlier_ones(tmp_path: Path) -> None:
    for _ in range(2):
        write_plan(RANKER, tmp_path / "new" / "plan")
    assert {path.name for path in (tmp_path / "new" / "plan").iterdir()} == {"plan.json", "plan.txt", "plan.svg"}
    assert json.loads((tmp_path / "new" / "plan" / "plan.json").read_text()) == RANKER
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \("):
        write_plan(RANKER, tmp_path / "file")
