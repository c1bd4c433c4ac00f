"""The benchmark of attention runs, and its ways agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import attention


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "attention.json"
    attention.main(["--rows=8", "--history-rows=5", "--rounds=2", f"--out={out}"])
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
    loops = [(row["dtype"], row["lengths"], row["way"]) for row in result["one_history"]]
    kinds = [(dtype, lengths) for dtype in ("float32", "bfloat16") for lengths in ("full", "random")]
    known = result["settings"]["instructions"] is not None
    assert loops == [(*kind, way) for kind in kinds for way in ("loops", "operations") if known]
    assert all(row["difference"] < attention.TOLERANCE for row in result["one_history"] if row["dtype"] == "float32")
    for row in result["one_history"]:
        least, most = row["forward_seconds"]["range"]
        assert 0 <= least <= row["forward_seconds"]["median"] <= most


def test_ways_that_differ_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="full: ours and padded differ by"):
        attention.main(["--rows=4", "--rounds=1"])
