"""A process's own copy of the search vectors: when it is made, and that it always holds the version asked for."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.features import search_copy
from trainer.data.features.search_copy import SearchCopy, pays
from trainer.data.features.search_vectors import SearchSpace, SpaceTable
from trainer.runtime import large_pages

TABLES = {"item": SpaceTable(50, 20), "author": SpaceTable(3, 16)}
FIRST = {"item": SpaceTable(50, 48)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Settings of the system, which a test may change; small versions are copied too."""
    settings: dict[str, str | None] = {"enabled": "madvise", "shmem_enabled": "never"}
    for module in (search_copy, large_pages):
        monkeypatch.setattr(module, "large_pages_setting", lambda memory="enabled": settings[memory])
    monkeypatch.setattr(search_copy, "free_memory", lambda: 1_000_000)
    monkeypatch.setattr(search_copy, "LEAST_BYTES", 0)
    return settings


def put(space: SearchSpace, version: int) -> None:
    """Write random values of a version."""
    rng = np.random.default_rng(version)
    for values in space.at(version).values():
        values[:] = rng.integers(-99, 99, values.shape)
    space.newest = version


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_copy_has_the_values_of_each_version(dtype: str, machine: dict[str, str | None]) -> None:
    """Versions of two sizes, asked for repeatedly while the shared memory is written again."""
    space = SearchSpace(FIRST, TABLES, dtype, refresh_steps=4)
    copy = SearchCopy(space, processes=2)
    assert copy.is_copy
    for version in range(6):
        put(space, version)
        for asked in (version, version, max(version - 1, 0), version):
            found, expected = copy.at(asked), space.at(asked)
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values)
                assert found[name].dtype == values.dtype and not np.shares_memory(found[name], values)


def test_a_version_is_copied_once(machine: dict[str, str | None]) -> None:
    space = SearchSpace(TABLES, TABLES, "float16", refresh_steps=4)
    put(space, 0)
    copy = SearchCopy(space, processes=1)
    copy.at(0)
    space.at(0)["item"][1, 0] = 77
    assert copy.at(0)["item"][1, 0] != 77


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        ({}, True),
        ({"enabled": "always"}, True),
        ({"enabled": "never"}, False),
        ({"enabled": None}, False),
        ({"shmem_enabled": None}, True),
        ({"shmem_enabled": "deny"}, True),
        ({"shmem_enabled": "advise"}, False),
        ({"shmem_enabled": "within_size"}, False),
    ],
)
def test_a_copy_is_made_where_only_own_memory_has_large_pages(
    change: dict[str, str | None], copied: bool, machine: dict[str, str | None]
) -> None:
    machine.update(change)
    space = SearchSpace(TABLES, TABLES, "float16", refresh_steps=4)
    put(space, 0)
    copy = SearchCopy(space, processes=1)
    assert copy.is_copy == copied
    assert np.shares_memory(copy.at(0)["item"], space.at(0)["item"]) != copied


def test_memory_that_is_not_shared_is_not_copied(machine: dict[str, str | None]) -> None:
    assert not SearchCopy(SearchSpace(TABLES, TABLES, "float16", 4, forked=False), processes=1).is_copy


def test_all_copies_take_at_most_a_quarter_of_the_free_memory(
    machine: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pays(50_000, 5) and not pays(50_000, 6)
    monkeypatch.setattr(search_copy, "LEAST_BYTES", 50_001)
    assert not pays(50_000, 1) and pays(50_001, 1)
    monkeypatch.setattr(search_copy, "free_memory", lambda: None)
    assert not pays(50_001, 1)
