"""The benchmark of duplicate ids runs, and both ways train the same tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.speed import dedup


def check(written: dict[str, Any], ranks: Sequence[int]) -> None:
    assert [result["ranks"] for result in written["results"]] == list(ranks)
    for result in written["results"]:
        assert 0 < result["unique_ids"] < result["ids"]
        assert set(result["ways"]) == set(dedup.WAYS)
        for found in result["ways"].values():
            assert found["milliseconds_in_all"] > 0 and found["processor_milliseconds"] > 0
            assert (found["megabytes_to_other_ranks"] > 0) == (result["ranks"] > 1)


def test_a_small_run_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(module: str, arguments: Sequence[object], ranks: int) -> dict[str, Any]:
        assert module == "benchmarks.speed.dedup"
        out = tmp_path / f"{ranks}.json"
        dedup.main([*map(str, arguments), str(out)])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    plain, out = dist.all_to_all_single, tmp_path / "results" / "dedup.json"
    monkeypatch.setattr(dedup, "run_ranks", run_here)
    monkeypatch.setattr(dedup, "ROWS", {"item": 2000, "author": 200, "side": 4096})
    monkeypatch.setattr(dedup, "HISTORY", 100)
    dedup.main(["--rows=8", "--length=5", f"--out={out}"])
    written = json.loads(out.read_text())
    check(written, (1, 1))
    assert written["results"][0]["largest_difference_of_tables"] == 0
    assert written["settings"]["rows_a_rank"] == 8
    assert dist.all_to_all_single is plain
    assert "as they come" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_on_one_and_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "dedup.json"
    dedup.main(["--rows=8", "--length=5", f"--out={out}"])
    written = json.loads(out.read_text())
    check(written, (1, 2))
    assert written["results"][1]["largest_difference_of_tables"] < 1e-3
