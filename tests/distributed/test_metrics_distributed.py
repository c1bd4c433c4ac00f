"""Every rank reports the metrics of all rows, for any division of the rows among the ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.data.format.schema import partition_of
from trainer.metrics.behaviour_metrics import BehaviourMetrics, ProgressiveMetrics

BEHAVIOURS = ("common", "rare", "tied", "single_class")


def world_rows(seed: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    rows = 5000
    user_id = generator.integers(0, 400, rows)
    probability = generator.beta(1, 4, (rows, len(BEHAVIOURS))).astype(np.float32)
    probability[:, 2] = np.round(probability[:, 2] * 4) / 4
    label = generator.random(probability.shape) < probability * np.array([1, 0.02, 1, 0])
    return user_id, probability, label, generator.random(probability.shape) < 0.7


def owner(user_id: np.ndarray, layout: str, world: int) -> np.ndarray:
    """Return the rank of each row: users are spread over all ranks, or the last rank has all of them."""
    return partition_of(user_id, world) if layout == "spread" else np.full(len(user_id), world - 1)


def report(rank: int, world: int, layout: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    reports = []
    for seed in range(3):
        rows = world_rows(seed)
        own_rows = owner(rows[0], layout, world) == rank
        for metrics in (BehaviourMetrics(BEHAVIOURS), ProgressiveMetrics(BEHAVIOURS)):
            metrics.update(*(torch.from_numpy(column[own_rows]) for column in rows))
            reports.append(metrics.compute(dist.group.WORLD))
        # The sample is smaller than the data, so the ranks have to agree on one sample of users.
        sampled = ProgressiveMetrics(BEHAVIOURS, sampled_rows=1500)
        sampled.update(*(torch.from_numpy(column[own_rows]) for column in rows))
        reports.append(sampled.compute(dist.group.WORLD))
    Path(out, f"{rank}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "layout"), [(2, "spread"), (3, "spread"), (3, "last")])
def test_ranks_agree_with_one_process(tmp_path: Path, world: int, layout: str) -> None:
    mp.spawn(report, args=(world, layout, str(tmp_path)), nprocs=world)
    texts = {Path(tmp_path, f"{rank}.json").read_text() for rank in range(world)}
    assert len(texts) == 1, "every rank must report the same"
    reports = iter(json.loads(texts.pop()))
    for seed in range(3):
        rows = [torch.from_numpy(column) for column in world_rows(seed)]
        for metrics in (
            BehaviourMetrics(BEHAVIOURS),
            ProgressiveMetrics(BEHAVIOURS),
            ProgressiveMetrics(BEHAVIOURS, sampled_rows=1500),
        ):
            metrics.update(*rows)
            got = next(reports)
            for behaviour, expected in metrics.compute().items():
                assert got[behaviour]["auc"] == expected["auc"], "pairs are counted in integers"
                for name, value in expected.items():
                    assert got[behaviour][name] == (None if value is None else pytest.approx(value, rel=1e-10))
