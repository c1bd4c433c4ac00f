"""Every rank reports the metrics of all rows, for any division of the rows among the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import RunRanks
from tests.distributed.metrics_ranks import SEEDS, all_metrics, world_rows


@pytest.mark.parametrize(("world", "layout"), [(2, "spread"), (3, "spread"), (3, "last")])
def test_ranks_agree_with_one_process(run_ranks: RunRanks, tmp_path: Path, world: int, layout: str) -> None:
    run_ranks("tests.distributed.metrics_ranks", layout, tmp_path, ranks=world)
    texts = {Path(tmp_path, f"{rank}.json").read_text() for rank in range(world)}
    assert len(texts) == 1, "every rank must report the same"
    reports = iter(json.loads(texts.pop()))
    for seed in range(SEEDS):
        rows = [torch.from_numpy(column) for column in world_rows(seed)]
        for metrics in all_metrics():
            metrics.update(*rows)
            got = next(reports)
            for behaviour, expected in metrics.compute().items():
                assert got[behaviour]["auc"] == expected["auc"], "pairs are counted in integers"
                for name, value in expected.items():
                    assert got[behaviour][name] == (None if value is None else pytest.approx(value, rel=1e-10))
