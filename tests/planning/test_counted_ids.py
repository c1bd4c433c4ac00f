"""Ids that are counted in a dataset: against NumPy, with and without deduplication, and too few rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from modules.embeddings import Lookup, Table
from trainer.config.ranker import JobConfig, parse_config
from trainer.console.errors import UserError
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import read_rows
from trainer.data.simulator.write_dataset import simulate
from trainer.planning.accelerators import describe_cluster
from trainer.planning.counted_ids import count_ids, counts_of
from trainer.planning.ranker_plan import Assumptions, plan_ranker
from trainer.ranking.setup import split_in_time


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counted") / "world"
    simulate(path, users=40, days=3, partitions=2, seed=1)
    return path


def job(world: Path, **sections: Any) -> JobConfig:
    features = {
        "history": {"seen": {"domain": "video", "length": 10}, "long": {"domain": "live", "search": "top"}},
        "item": {"ids": "dynamic", "rows": 300},
        "search": {"tables": ["author"]},
        **sections.pop("features", {}),
    }
    return parse_config({"data": {"path": str(world)}, "features": features, **sections}, "job.toml")


@pytest.mark.parametrize("deduplicate", [True, False])
def test_counts_are_those_of_the_rows(world: Path, deduplicate: bool) -> None:
    found = count_ids(job(world, tables={"deduplicate": deduplicate}), 64)
    assert found.rows == 64 and 0 < found.fill < 1
    users, items = found.tables["user"], found.tables["item"]
    assert users.ids == 64 and 64 < items.ids <= 64 * 111
    if deduplicate:
        assert 1 < users.distinct < 40 and items.distinct < items.ids
    else:
        assert users.distinct == 64 and items.distinct == items.ids
    for of_table in found.tables.values():
        assert of_table.spread.between(0, 1) == pytest.approx(1)
        assert (np.diff(of_table.spread.shares) >= 0).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_counts_of_a_batch_are_those_of_numpy(seed: int, deduplicate: bool) -> None:
    random, rows = np.random.default_rng(seed), 40
    lengths = random.integers(0, 7, rows)
    candidates, past = random.integers(0, 100, rows), random.integers(0, 100, lengths.sum())
    users = random.integers(0, 100, rows)
    keyed = KeyedJaggedTensor(
        ["item", "past", "user"],
        torch.from_numpy(np.concatenate([candidates, past, users])),
        lengths=torch.from_numpy(np.concatenate([np.ones(rows, int), lengths, np.ones(rows, int)])),
    )
    lookups = [Lookup("item", "item", 1), Lookup("past", "item", None, max_length=6), Lookup("user", "user", 1)]
    batch: Any = SimpleNamespace(rows=rows, ids=[keyed])
    found = counts_of(batch, [Table("item", 100, 8), Table("user", 100, 8)], lookups, deduplicate=deduplicate)
    assert found.rows == rows and found.fill == pytest.approx(lengths.mean() / 6)
    for name, ids in (("item", np.concatenate([candidates, past])), ("user", users)):
        sent = np.unique(ids) if deduplicate else ids
        of_table = found.tables[name]
        assert (of_table.ids, of_table.distinct) == (len(ids), len(sent))
        for first, last in ((0, 25), (25, 50), (50, 100)):
            share = ((sent >= first) & (sent < last)).mean()
            assert of_table.spread.between(first / 100, last / 100) == pytest.approx(share)


def test_the_rows_are_those_of_the_later_half_of_the_training_range(world: Path) -> None:
    config, data = job(world), Dataset.open(str(world), "error")
    split, rows = split_in_time(config, data.spec), read_rows(str(world), data.spec)
    begin, end = max(split.train_from, data.spec.span_ms[0]), min(split.train_until, data.spec.span_ms[1])
    late = (rows["emit_ms"] >= (begin + end) // 2) & (rows["emit_ms"] < split.train_until)
    users = rows["user_id"][late]
    assert 0 < len(users) < len(late)
    found = count_ids(config, len(users)).tables["user"]
    assert (found.ids, found.distinct) == (len(users), len(np.unique(users)))


def test_a_plan_takes_the_counts_and_says_so(world: Path) -> None:
    config = job(world, train={"batch_size": 128})
    counted = count_ids(config, 64)
    spec = Dataset.open(str(world), "error").spec
    plan = plan_ranker(config, spec, describe_cluster("h200", 2, 1), Assumptions(), {}, counted)
    assert plan["assumptions"]["ids"] == "counted in 64 rows of the dataset"
    assert plan["assumptions"]["fill"] == counted.fill
    for table in plan["tables"]:
        assert table["distinct_ids_per_step"] == counted.tables[table["table"]].distinct


def test_too_few_rows_are_one_line(world: Path) -> None:
    with pytest.raises(UserError, match=r"^--count-ids: the later half of the training range has .* rows in .*world"):
        count_ids(job(world), 10**6)
