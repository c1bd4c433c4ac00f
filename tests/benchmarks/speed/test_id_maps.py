"""The benchmark of id maps runs, and every map serves ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import id_maps


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "id_maps.json"
    id_maps.main(["--rows=1024", "--ids=500", "--steps=12", f"--out={out}"])
    written = json.loads(out.read_text())
    assert (written["rows"], written["ids"], written["steps"]) == (1024, 500, 12)
    assert len(written["result"]) == len(id_maps.BUCKETS) + 1 + len(id_maps.INTERVALS)
    for name, found in written["result"].items():
        assert found["ids_per_second"] > 0, name
        assert 0 <= found["kept"] <= found["served"] <= 1 and found["served"] > 0, name
    # A step's unique ids fit into the rows: a map that keeps an order serves all of them.
    assert written["result"]["one order of all rows"]["served"] == 1
    assert "TorchRec, every 10 steps" in capsys.readouterr().out
