"""The benchmark of the sources runs, and reads what it wrote."""

from __future__ import annotations

import json

import pytest

from benchmarks import sources


def test_a_small_run(tmp_path, capsys):
    pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: make setup EXTRAS=llm,dev,kafka")
    out = tmp_path / "results" / "sources.json"
    sources.main(["--events=3000", "--topic-events=1500", "--repeats=1", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert [result["read"]["events"] for result in results.values()] == [3000, 1500, 1500, 1500]
    assert all(run["events_per_second"] > 0 for result in results.values() for run in result.values())
    assert "| kafka, json, 100 a message |" in capsys.readouterr().out
