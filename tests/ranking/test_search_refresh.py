"""A refresh of the search vectors copies the tables in chunks: a GPU that is full of tables has no room for another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.peak_memory import peak_bytes
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.ranking import search_refresh
from trainer.ranking.search_refresh import SearchSpaceRefresher, largest_magnitude
from trainer.runtime.distributed import World
from trainer.sparse.sharded_tables import Shard

ROWS, DIM = 1 << 14, 32


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_version_is_written_without_a_second_copy_of_the_shard(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_refresh, "_CHUNK_ROWS", 512)
    tables = {"item": SpaceTable(ROWS, DIM)}
    space = SearchSpace(tables, tables, dtype, 4)
    values = torch.randn(ROWS, DIM)
    engine: Any = SimpleNamespace(table_shards=lambda: iter([Shard("item", values, 0, 0)]))
    unused: Any = None
    with World.join("cpu") as world:
        refresher = SearchSpaceRefresher(space, unused, unused, engine, world)
        assert peak_bytes(lambda: refresher._write_version(0)) < values.nbytes / 16
    expected = space.quantised(values.numpy(), float(values.abs().max()))[1:]
    assert np.array_equal(space.at(0)["item"][1:, :DIM], expected)


def written_by(refresh_steps: int, newest: int, act: str, *steps: int) -> list[int]:
    """Return the versions that a refresher writes."""
    tables = {"item": SpaceTable(4, DIM)}
    space = SearchSpace(tables, tables, "float16", refresh_steps)
    space.newest = newest
    unused: Any = None
    refresher = SearchSpaceRefresher(space, unused, unused, unused, unused)
    written: list[int] = []

    def write(version: int) -> None:
        written.append(version)
        space.newest = version

    refresher._write_version = write  # type: ignore[method-assign]
    for step in steps:
        getattr(refresher, act)(step)
    if not steps:
        getattr(refresher, act)()
    return written


def test_versions_are_written_when_they_are_due_and_once() -> None:
    assert written_by(4, 0, "after_step", *range(13)) == [1, 2, 3]
    assert written_by(0, 0, "after_step", *range(13)) == []
    assert written_by(4, 0, "catch_up", 3, 4, 5, 8, 21, 23, 24) == [1, 2, 5, 6]
    assert written_by(0, 0, "catch_up", 3, 4, 5) == []
    assert written_by(4, 6, "finish") == [7]
    assert written_by(0, 0, "finish") == []


@pytest.mark.parametrize("values", [[1.0, -3.0], [2.5, -1.0], [0.0], [-4.0], [float("nan"), 1.0], [float("-inf"), 1.0]])
def test_the_largest_magnitude(values: list[float]) -> None:
    tensor = torch.tensor(values)
    torch.testing.assert_close(torch.tensor(largest_magnitude(tensor)), tensor.abs().max(), equal_nan=True)
