"""The benchmark of throughput trains, from shards to metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed import throughput
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import RowStore
from trainer.data.loading.loader import Loader
from trainer.runtime.phase_timer import PHASES

SMALL = ["--scale=512", "--repeats=1", "--precisions", "fp32"]


def check(written: dict[str, Any], setups: Sequence[str]) -> None:
    assert [run["setup"] for run in written["best"]] == list(setups)
    for run in written["best"]:
        batch = throughput.BATCH // 512
        assert run["rows"] == throughput.ROWS // 512 - throughput.WARM_UP_STEPS * batch
        assert run["rows_per_second"] > 0 and set(run["shares"]) == set(PHASES)
        assert sum(run["shares"].values()) == pytest.approx(1)
        floor = run["product_gflops"] * 1e9 / throughput.FLOP_PER_ROW
        assert run["share_of_product_rate"] == pytest.approx(run["rows_per_second"] / floor)
        assert {table["table"] for table in run["plan"]} == {"user", "author", "item", "side"}


def test_a_small_run_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(module: str, arguments: Sequence[object], ranks: int, threads: int, cpu_only: bool) -> dict[str, Any]:
        assert module == "benchmarks.speed.throughput" and (ranks, threads) == (1, 1)
        out = tmp_path / "rank.json"
        throughput.main([*map(str, arguments), str(out)])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    monkeypatch.setattr(throughput, "run_ranks", run_here)
    out = tmp_path / "results" / "throughput.json"
    throughput.main([*SMALL, "--setups", "1x1", f"--out={out}"])
    check(json.loads(out.read_text()), ["1x1"])
    assert "| 1x1 | fp32 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    throughput.main([*SMALL, "--setups", "2x1", f"--out={out}"])
    check(json.loads(out.read_text()), ["2x1"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_features_are_the_peers_inputs(tmp_path: Path, workers: int) -> None:
    throughput.write_dataset(tmp_path, scale=2048)
    spec = DatasetSpec.load(tmp_path)
    features = throughput.WorkloadFeatures(spec)
    store, histories = RowStore(tmp_path, spec), Histories(tmp_path, spec)
    loader = Loader(store, histories, features, rank=0, world=1, batch_size=16, seed=1, workers=workers)
    rows = 0
    for batch in loader:
        (keyed,) = batch.ids
        lengths = dict(zip(keyed.keys(), keyed.lengths().view(len(keyed.keys()), -1), strict=True))
        values = dict(zip(keyed.keys(), keyed.values().split(keyed.length_per_key()), strict=True))
        assert (lengths["past_item"] == throughput.LENGTH).all() and (lengths["side"] == 3).all()
        assert (values["user"] == batch.user_id).all()
        offsets = np.cumsum([0] + [count for _, count in throughput.SIDE])
        side = values["side"].view(-1, 3).numpy()
        assert (side >= offsets[:-1]).all() and (side < offsets[1:]).all()
        rows += batch.rows
    assert rows == spec.rows == throughput.ROWS // 2048
