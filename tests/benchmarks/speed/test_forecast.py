"""The benchmark of Foresight's inference runs, and every output of both sizes has a rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import forecast


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "forecast.json"
    forecast.main(["--codes=50", "--rows=4", "--repeats=2", f"--out={out}"])
    result = json.loads(out.read_text())
    rates = result["authors_a_second"]
    assert set(rates) == set(forecast.SIZES)
    assert all(set(of_size) == {"D", "forecast", "log p"} for of_size in rates.values())
    for size, of_size in rates.items():
        assert {name: spread["most"] for name, spread in result["spread"][size].items()} == of_size
    assert all(rate > 0 for of_size in rates.values() for rate in of_size.values())
    assert "authors/s and core" in capsys.readouterr().out
