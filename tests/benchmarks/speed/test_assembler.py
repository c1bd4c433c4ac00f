"""The assembler's benchmark runs, and its figures add up."""

from __future__ import annotations

import json

from benchmarks.speed import assembler
from trainer.stream.labels.policy import POLICIES


def test_a_small_run(tmp_path, capsys):
    out = tmp_path / "results" / "assembler.json"
    assembler.main(["--users=60", "--days=1", "--repeats=2", "--portion=512", f"--out={out}"])
    result = json.loads(out.read_text())
    live, everything = result["results"]
    assert live["events"] == everything["events"] == everything["candidate_events"] > live["candidate_events"] > 0
    for world in (live, everything):
        assert set(world["policies"]) == set(POLICIES)
        volumes = {name: found["rows"] for name, found in world["policies"].items()}
        assert 0 < volumes["full"] <= volumes["fast_slow"] < volumes["realtime"] < volumes["realtime_naive"]
    for found in everything["policies"].values():
        assert {work: of_work["most"] for work, of_work in found["spread"].items()} == found["events_per_second"]
    rates = [found["events_per_second"]["batch"] for world in result["results"] for found in world["policies"].values()]
    assert result["slowest"]["batch"] == min(rates) > 0
    assert "batch: slowest" in capsys.readouterr().out
