"""Stores of recent codes, one of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.semantic_ids.redis_server import BINARY, REASON, RedisServer
from trainer.semantic_ids.code_store import CodeStore, StoreSettings
from trainer.semantic_ids.store_address import open_store

OpenStore = Callable[..., CodeStore]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip(REASON)
    pytest.importorskip("redis", reason="needs the package redis: pip install 'limelight[redis]'")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Return the address of a store that is not there yet."""
    numbers = count()
    if request.param == "sqlite":
        return lambda: str(tmp_path / f"codes-{next(numbers)}.sqlite")
    server = request.getfixturevalue("redis_server")
    return lambda: f"{server.url}?prefix={tmp_path.name}-{next(numbers)}:"


@pytest.fixture
def new_store(new_place: Callable[[], str]) -> Iterator[OpenStore]:
    """``new_store(runs_kept=3)`` opens a new store, which is closed at the end."""
    opened: list[CodeStore] = []

    def make(version: str = "v1", **settings: int) -> CodeStore:
        opened.append(open_store(new_place(), StoreSettings(version, **settings)))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
