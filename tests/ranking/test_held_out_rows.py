"""Predictions that a run keeps: the sample of users, and what came before each row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import partition_of
from trainer.data.format.time_selection import Selection
from trainer.data.simulator.write_dataset import simulate
from trainer.ranking import held_out_rows
from trainer.ranking.evaluation import Predictions
from trainer.ranking.held_out_rows import stored_columns, write_held_out

EVERYTHING = Selection()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("held_out") / "world"
    simulate(path, users=20, days=1, partitions=2, seed=1)
    return Dataset.open(str(path), "error")


def rows_of(data: Dataset, partition: int) -> dict[str, np.ndarray]:
    records = [data.store.read(partition, record) for record in range(len(data.store.records(partition).emit_min))]
    known = [rows for rows in records if rows is not None]
    return {name: np.concatenate([rows[name] for rows in known]) for name in known[0]}


def write(data: Dataset, file: Path, truth: bool = False) -> Any:
    """Write the rows of two ranks, of which each has a partition; returns the table."""
    parts: list[Any] = []
    total = sum(len(rows_of(data, partition)["user_id"]) for partition in range(2))
    for rank in (1, 0):
        rows = rows_of(data, rank)
        columns = {name: torch.from_numpy(rows[name]) for name in ("user_id", "visit_id", "request_ms")}
        flags = {name: torch.from_numpy(rows[name]).float() for name in ("label", "mask")}
        probability = torch.rand(rows["label"].shape, generator=torch.Generator().manual_seed(rank))
        predictions = Predictions(**columns, **flags, probability=probability)

        def gather(table: Any, rank: int = rank) -> Any:
            parts.append(table)
            return None if rank else parts

        world: Any = SimpleNamespace(rank=rank, size=2, sum=lambda own: total, gather=gather)
        known = probability if truth else None
        write_held_out(file, predictions, data.spec.behaviours, known, data, EVERYTHING, world)
    return pq.read_table(file)


def test_all_rows_are_kept_with_what_came_before_them(data: Dataset, tmp_path: Path) -> None:
    table = write(data, tmp_path / "rows.parquet", truth=True)
    stored = {
        visit: (user, *stat)
        for partition in range(2)
        for visit, user, *stat in (
            lambda rows: zip(
                *(rows[name].tolist() for name in ("visit_id", "user_id", "item_id", "author_id")),
                *stat_columns(data, rows),
                strict=True,
            )
        )(rows_of(data, partition))
    }
    assert len(table) == len(stored) > 30
    names = ("visit_id", "user_id", "item_id", "author_id", "earlier_user", "earlier_author")
    for visit, *values in zip(*(table[name].to_pylist() for name in names), strict=True):
        assert stored[visit] == tuple(values)
    assert max(table["earlier_user"].to_pylist()) > 0
    assert table.schema.metadata[b"timezone"].decode() == data.spec.timezone
    assert table["truth_click"].to_pylist() == table["p_click"].to_pylist()
    assert "truth_click" not in write(data, tmp_path / "rows.parquet").column_names


def stat_columns(data: Dataset, rows: dict[str, np.ndarray]) -> list[list[float]]:
    width = 1 + len(data.spec.behaviours)
    return [rows["stat"][:, data.spec.statistics.index((key,)) * width].tolist() for key in ("user", "author")]


def test_a_sample_has_whole_users_and_the_same_ones_each_time(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(data, tmp_path / "rows.parquet")
    monkeypatch.setattr(held_out_rows, "KEPT", len(whole) // 3)
    small = write(data, tmp_path / "rows.parquet")
    users = set(small["user_id"].to_pylist())
    assert 0 < len(small) < 2 * len(whole) // 3
    assert len(small) == sum(user in users for user in whole["user_id"].to_pylist())
    below = int(small.schema.metadata[b"users_below"])
    every = np.unique(whole["user_id"].to_numpy())
    assert users == set(every[partition_of(every, held_out_rows.USER_HASHES) < below].tolist())
    monkeypatch.setattr(held_out_rows, "KEPT", len(whole) // 6)
    assert set(write(data, tmp_path / "rows.parquet")["user_id"].to_pylist()) <= users


def test_a_visit_without_a_row_has_no_number(data: Dataset) -> None:
    world: Any = SimpleNamespace(rank=0, size=1)
    known = int(rows_of(data, 0)["visit_id"][3])
    found = stored_columns(data, EVERYTHING, np.array([1 << 60, known, -1]), world)
    assert np.isnan(found["earlier_user"]).tolist() == [True, False, True]
    assert (found["item_id"] == -1).tolist() == [True, False, True]
    none = stored_columns(data, Selection(request_from=1 << 60), np.array([known]), world)
    assert np.isnan(none["earlier_author"]).all()
