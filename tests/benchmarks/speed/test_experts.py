"""The benchmark of experts runs, and its ways agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import experts


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "experts.json"
    experts.main(["--rows=12", "--rounds=2", f"--out={out}"])
    result = json.loads(out.read_text())
    known = result["settings"]["instructions"] is not None
    parts = ("experts 1", "experts 2", "towers", "whole")
    assert [(row["part"], row["way"]) for row in result["experts"]] == [
        (part, way) for part in parts for way in ("loops", "operations") if known
    ]
    for row in result["experts"]:
        least, most = row["backward_seconds"]["range"]
        assert 0 <= least <= row["backward_seconds"]["median"] <= most and row["difference"] < experts.TOLERANCE
    assert result["settings"]["inputs"] == 136 and result["environment"]["ranks"] == 1
    assert "backward ms" in capsys.readouterr().out


@pytest.mark.skipif(experts.instructions_for(experts.torch.device("cpu")) is None, reason="needs AVX2 or AVX-512")
def test_ways_that_differ_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="experts 1: loops and operations differ by"):
        experts.main(["--rows=4", "--rounds=1"])
