"""The loader's benchmark runs, and its figures add up."""

from __future__ import annotations

import json

import pytest

from benchmarks.speed import loader


def test_a_small_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loader, "USERS", 50)
    out = tmp_path / "results" / "loader.json"
    loader.main(["--rows=3000", "--batch=256", "--workers", "0", "1", "--repeats=1", f"--out={out}"])
    result = json.loads(out.read_text())
    assert [run["rows"] for run in result["best"]] == [3000, 3000]
    # user, author, item, 31 side ids with the domain, and two full histories of 50 with 4 ids an entry
    assert {run["ids_per_row"] for run in result["best"]} == {3 + 31 + 2 * 50 * 4}
    assert sum(result["shares"].values()) == pytest.approx(1)
    # Every stage that is measured was found: none of them takes nothing.
    assert all(share > 0 for share in result["shares"].values())
    assert "| workers | rows/s | rows per CPU second |" in capsys.readouterr().out
