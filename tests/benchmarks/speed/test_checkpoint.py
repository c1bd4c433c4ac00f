"""The benchmark of checkpoints runs, and its figures are of what was written."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import checkpoint

LAYOUTS = {1: {"table_wise": (), "row_wise": ("1 x table_wise",)}}


def measure_rank(scratch: Path, gigabytes: float, out: Path) -> None:
    """The benchmark's, with these layouts in a process that has none of what a test sets."""
    checkpoint.LAYOUTS = LAYOUTS
    checkpoint.measure_rank(scratch, gigabytes, out)


def start_one(ranks: int, scratch: Path, gigabytes: float) -> dict[str, Any]:
    """A single rank without a launcher, in a process of its own: memory freed by earlier tests would hide its peak."""
    assert ranks == 1
    # A turn must not read the checkpoints of an earlier one.
    assert not list(scratch.iterdir())
    out = scratch.with_suffix(".json")
    process = multiprocessing.get_context("spawn").Process(target=measure_rank, args=(scratch, gigabytes, out))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(out.read_text())


def test_a_small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checkpoint, "LAYOUTS", LAYOUTS)
    monkeypatch.setattr(checkpoint, "start", start_one)
    out, scratch = tmp_path / "results" / "checkpoint.json", tmp_path / "scratch"
    scratch.mkdir()
    checkpoint.main(["--gigabytes=0.02", "--repeats=2", f"--directory={scratch}", f"--out={out}"])
    found = json.loads(out.read_text())
    assert [save["by"] for save in found["saves"]] == ["1 x table_wise", "1 x row_wise"]
    for save in found["saves"]:
        # 17 numbers a row, 16 of the table and one of its optimizer, and what the network and the format add.
        assert 20e6 < save["bytes"] < 20.5e6
        assert 0 < save["background"]["stall_seconds"] < save["background"]["seconds"]
        assert save["step_seconds"] > 0 and save["background"]["step_seconds"] > 0
        turns = [run["stopping"]["seconds"] for run in save["runs"]]
        assert len(turns) == 2 and save["stopping"]["seconds"] == pytest.approx(sum(turns) / 2)
    # In the background a copy of the model is written; the second layout's may lie where the first one's was.
    assert found["saves"][0]["background"]["peak_bytes"] > 15e6
    layouts = [(load["saved_by"], load["by"]) for load in found["loads"]]
    assert layouts == [
        ("1 x table_wise", "1 x table_wise"),
        ("1 x table_wise", "1 x row_wise"),
        ("1 x row_wise", "1 x row_wise"),
    ]
    for load in found["loads"]:
        assert 20e6 < load["bytes"] < 20.5e6
        assert load["load"]["seconds"] > 0 and load["restore"]["seconds"] > 0
        assert load["largest_table_bytes"] == pytest.approx(0.6 * 20e6 * 16 / 17, rel=1e-3)
    assert not [path for path in scratch.iterdir() if path.is_dir()], "checkpoints are removed"
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert any(line[:2] == ["1 x table_wise", "background"] for line in printed)
    assert any(line[:2] == ["1 x table_wise", "1 x row_wise"] for line in printed)
