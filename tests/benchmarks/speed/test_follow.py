"""The benchmark of following rooms on air runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import follow
from trainer.llm.embedding.segment_encoder import TextSegmentEncoder


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "follow.json"
    follow.main(["--rooms", "3", "--minutes", "2", "--repeats", "2", f"--out={out}"])
    (result,) = json.loads(out.read_text())["results"]
    assert len(result["runs"]) == 2
    assert result["segments"] == 12 and result["needed_per_second"] == 0.1 and result["dropped_share"] == 0
    assert 0 < result["lag_seconds"]["p50"] <= result["lag_seconds"]["max"]
    assert "reached/s" in capsys.readouterr().out


def test_the_clock_leaves_pauses_out_and_a_slow_model_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment takes a second of the clock, and three rooms a second need more."""
    clocks, encode = [], TextSegmentEncoder.encode

    class Slow(follow.BusyClock):
        def __init__(self) -> None:
            super().__init__()
            clocks.append(self)

    def slow(self: TextSegmentEncoder, texts: list[str], frames: list[list[str]]) -> object:
        clocks[-1].sleep(len(texts))
        return encode(self, texts, frames)

    monkeypatch.setattr(follow, "BusyClock", Slow)
    monkeypatch.setattr(TextSegmentEncoder, "encode", slow)
    out = tmp_path / "follow.json"
    follow.main(["--rooms", "45", "--minutes", "3", "--repeats", "1", f"--out={out}"])
    (result,) = json.loads(out.read_text())["results"]
    assert 0.05 < result["dropped_share"] < 0.5 and result["lag_seconds"]["max"] > 30
