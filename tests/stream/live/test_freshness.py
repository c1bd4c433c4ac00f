"""Tests of the quantiles of delays over ranks, against numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from trainer.stream.live import freshness as module
from trainer.stream.live.freshness import Freshness
from trainer.stream.live.visit_features import NEVER


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_those_of_the_delays_that_count(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor, group: dist.ReduceOp.SUM)
    rng = np.random.default_rng(seed)
    now = 10**12
    delays = rng.lognormal(10, 1.5, (4000, 3)).astype(np.int64)
    counted, known = rng.random(delays.shape) < 0.3, rng.random(delays.shape) < 0.9
    freshness = Freshness()
    for first in range(0, 4000, 1000):
        part = slice(first, first + 1000)
        freshness.add(np.where(known[part], now - delays[part], NEVER), counted[part], now)
    summary = freshness.summary(SimpleNamespace(control=None))  # type: ignore[arg-type]
    assert summary is not None
    kept = delays[counted & known] / 1000
    assert summary["count"] == len(kept)
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert summary[name] == pytest.approx(np.quantile(kept, quantile), rel=0.05)


def test_without_delays_there_is_no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor, group: None)
    assert Freshness().summary(SimpleNamespace(control=None)) is None  # type: ignore[arg-type]
