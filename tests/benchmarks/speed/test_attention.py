"""The benchmark of attention runs, and its ways agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import attention


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "attention.json"
    attention.main(["--rows=8", "--rounds=1", f"--out={out}"])
    result = json.loads(out.read_text())
    ways = [(row["lengths"], row["way"]) for row in result["attention"]]
    assert ways == [(lengths, way) for lengths in attention.LENGTHS for way in ("ours", "padded", "din")]
    assert all(row["forward_seconds"] >= 0 and row["backward_seconds"] >= 0 for row in result["attention"])
    entries = {row["lengths"]: row["entries"] for row in result["attention"]}
    assert entries["full"] == 8 * 5 * 100 > entries["random"] > entries["half empty"] > 0
    differences = [row["difference"] for row in result["attention"] if row["way"] == "padded"]
    assert max(differences) < attention.TOLERANCE
    assert result["settings"]["rows"] == 8 and result["environment"]["ranks"] == 1
    assert "half empty" in capsys.readouterr().out


def test_ways_that_differ_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="full: ours and padded differ by"):
        attention.main(["--rows=4", "--rounds=1"])
