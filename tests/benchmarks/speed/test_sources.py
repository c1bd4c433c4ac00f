"""The benchmark of the sources runs, and reads what it wrote."""

from __future__ import annotations

import json

import pytest

from benchmarks.speed import sources


def test_a_small_run(tmp_path, capsys):
    pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    out = tmp_path / "results" / "sources.json"
    sources.main(["--events=3000", "--topic-events=1500", "--repeats=1", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert [result["read"]["events"] for result in results.values()] == [3000] * 2 + [1500] * 6
    runs = [result[what] for result in results.values() for what in ("read", "publish") if what in result]
    assert len(runs) == 14 and all(run["events_per_second"] > 0 for run in runs)
    for result in results.values():
        assert result["spread"]["events_per_second"]["most"] == result["read"]["events_per_second"]
    assert 100 < results["files, features"]["rows"] < 300
    printed = capsys.readouterr().out
    assert "| kafka, json, 100 a message, features |" in printed
    assert "joining the features of a million stored rows" in printed
