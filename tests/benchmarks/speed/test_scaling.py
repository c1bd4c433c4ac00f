"""The benchmark of scaling trains on several ranks, counts the bytes between them, and compares with one rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.speed import scaling


def test_a_small_run_on_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(module: str, arguments: Sequence[object], ranks: int) -> dict[str, Any]:
        assert module == "benchmarks.speed.scaling"
        out = tmp_path / "rank.json"
        if ranks == 1:
            scaling.main([*map(str, arguments), str(out)])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    monkeypatch.setattr(scaling, "run_ranks", run_here)
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)
    out = tmp_path / "scaling.json"
    scaling.main(["--scale=256", "--steps=3", "--repeats=1", "--ranks", "1", "2", "4", f"--out={out}"])
    results = json.loads(out.read_text())["results"]
    assert [(found["kind"], found["ranks"]) for found in results] == [
        *(("strong", ranks) for ranks in (1, 2, 4)),
        *(("weak", ranks) for ranks in (2, 4)),
    ]
    single = results[0]["rows_per_second"]["median"]
    for found in results:
        assert found["over_subscribed"] == (found["ranks"] == 4)
        assert found["efficiency"] == pytest.approx(found["rows_per_second"]["median"] / found["ranks"] / single)
        assert found["table_bytes"] == found["dense_bytes"] == 0, "one rank sends nothing"
    assert "4 (over-subscribed)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_send_ids_rows_and_gradients(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    scaling.main(["--scale=256", "--steps=3", "--repeats=1", "--ranks", "1", "2", f"--out={out}"])
    found = {(it["kind"], it["ranks"]): it for it in json.loads(out.read_text())["results"]}
    strong, weak = found["strong", 2], found["weak", 2]
    assert strong["dense_bytes"] == weak["dense_bytes"] > 0
    assert 1.5 * strong["table_bytes"] < weak["table_bytes"] < 2.1 * strong["table_bytes"]


def test_a_ring_sends_twice_the_part_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *rest, **options: reduced.append(options))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    counter = scaling.AllReduceCounter()
    counter(torch.zeros(100), group="some")
    assert counter.bytes == 2 * 3 / 4 * 400 and reduced == [{"group": "some"}]


def test_the_rate_of_one_rank_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--ranks", "2"])
    assert "begin with 1" in capsys.readouterr().err
