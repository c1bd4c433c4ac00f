"""The benchmark of attention runs, and its ways agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import attention, attention_parts


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
    kinds = ("multi_head", "twin", "din operations", *(["din loops"] if known else []))
    assert [(row["lengths"], row["kind"]) for row in result["parts"]] == [
        (lengths, kind) for lengths in ("full", "random") for kind in kinds
    ]
    for row in result["parts"]:
        assert (row["shares"] is None) == (row["kind"] == "din loops")
        for shares in (row["shares"] or {}).values():
            assert 0 < shares["products"] < 1 and sum(shares.values()) == pytest.approx(1)


def test_the_products_of_attention_are_counted() -> None:
    sizes = attention_parts.KindSizes(query=8, parts=(3, 4, 5), longest=6, heads=2, head_dim=10, hidden=(9, 7))
    rows, entry = 5, 3 + 4 + 5
    calls = attention_parts.kinds_of_attention(sizes, torch.full((rows,), sizes.longest), loops=False)
    found = {kind: attention_parts.operations_of(call) for kind, call in calls.items()}
    of_heads = 2 * 10 * (8 + entry + entry) + 2 * 2 * sizes.longest * entry
    assert found["multi_head"]["forward"] == 2 * rows * of_heads
    # The cross features take no part in the projection of the candidate.
    assert found["twin"]["forward"] == 2 * rows * (of_heads - 2 * 10 * 5)
    assert found["multi_head"]["backward"] > found["twin"]["backward"] > found["multi_head"]["forward"]


def test_ways_that_differ_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="full: ours and padded differ by"):
        attention.main(["--rows=4", "--rounds=1"])
