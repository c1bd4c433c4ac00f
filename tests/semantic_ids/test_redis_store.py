"""Redis's store of codes: a server that is down, killed, emptied, set up wrongly or used by others."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.semantic_ids.redis_server import BINARY, REASON, RedisServer
from tests.semantic_ids.test_sqlite_store import SETTINGS, segments
from trainer.console.errors import UserError
from trainer.semantic_ids.redis_store import RedisCodeStore, shown_address

redis = pytest.importorskip("redis", reason="needs the package redis: pip install 'limelight[redis]'")
pytestmark = pytest.mark.skipif(BINARY is None, reason=REASON)


def opened(url: str, retry_seconds: float = 0.0) -> RedisCodeStore:
    return RedisCodeStore(url, SETTINGS, retry_seconds)


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = opened(server.url)
    server.kill()
    address = server.url.removeprefix("redis://")
    for work in (
        lambda: store.append(segments(0, 10)),
        lambda: store.recent(np.array([1]), np.array([1]), 1),
        lambda: opened(server.url.replace("redis://", "redis://user:secret@"), 0.1),
    ):
        with pytest.raises(UserError, match=f"redis://{address}: no answer in 0") as caught:
            work()
        assert "secret" not in str(caught.value)


def test_a_server_that_is_killed_and_comes_back_loses_no_call_that_returned(tmp_path: Path) -> None:
    """Killed in the middle of writes, with a log that is flushed at each command."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    store, returned = opened(server.url, retry_seconds=120), []

    def write() -> None:
        for begin in range(0, 1500, 10):
            store.append(segments(begin, begin + 10))
            returned.append(begin)

    writer = threading.Thread(target=write)
    writer.start()
    for calls in (3, 40, 90):
        while len(returned) < calls and writer.is_alive():
            pass
        server.kill()
        while not server.start(server.port):
            pass
    writer.join()
    assert returned[-1] == 1490
    assert store.append(segments(0, 1500)) == (0, 1500, 0, 0)
    server.kill()


def test_a_server_that_lost_its_data_is_not_taken_for_an_empty_store(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = opened(server.url)
    store.append(segments(0, 10))
    redis.Redis(port=server.port).flushall()
    message = "has been emptied since it was opened; append the segments again"
    with pytest.raises(UserError, match=message):
        store.recent(np.array([1]), np.array([10**6]), 3)
    with pytest.raises(UserError, match=message):
        store.append(segments(10, 20))
    assert redis.Redis(port=server.port).dbsize() == 0
    server.kill()
    while not server.start(server.port):
        pass
    # Started again without its data, it has forgotten the script too.
    with pytest.raises(UserError, match=message):
        store.append(segments(10, 20))
    server.kill()


def test_a_server_that_forgot_the_script_gets_it_again(redis_server: RedisServer) -> None:
    store = opened(f"{redis_server.url}?prefix=forgot:")
    redis.Redis(port=redis_server.port).script_flush()
    assert store.append(segments(0, 10)).stored == 10
    store.close()


def test_a_server_that_removes_keys_by_itself_is_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with pytest.raises(UserError, match=r"maxmemory-policy allkeys-lru\); set it to noeviction"):
        opened(server.url)
    server.kill()


def test_a_server_without_memory_is_named(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = opened(server.url)
    redis.Redis(port=server.port).config_set("maxmemory", "1")
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/0: its memory is full"):
        store.append(segments(0, 100))
    server.kill()


def test_keys_of_others_are_refused(redis_server: RedisServer) -> None:
    client = redis.Redis(port=redis_server.port)
    client.set("others:settings", "on")
    with pytest.raises(UserError, match="others:settings is no setting of a store; name another prefix"):
        opened(f"{redis_server.url}?prefix=others:")
    store = opened(f"{redis_server.url}?prefix=mixed:")
    client.set("mixed:1", "some text")
    with pytest.raises(UserError, match="strings that are no codes"):
        store.recent(np.array([1]), np.array([1]), 1)
    client.delete("mixed:1")
    client.lpush("mixed:1", "a list")
    with pytest.raises(UserError, match="WRONGTYPE"):
        store.append(segments(1, 2))
    store.close()


@pytest.mark.parametrize(
    ("query", "message"),
    [("?db=1", "'db' is not known"), ("x?prefix=a", "'/0x' is no database"), ("999", "out of range")],
)
def test_a_wrong_address_is_named(query: str, message: str, redis_server: RedisServer) -> None:
    with pytest.raises(UserError, match=message):
        opened(f"{redis_server.url}{query}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("redis://:secret@host:port/0", "redis://host:port/0: not an address; write"),
        ("redis://me:some/secret@host:1/0", "redis://host:1/0: not an address; write / in a password as %2F"),
        ("redis://me:secret@host:1/0?db=1", "redis://host:1/0: 'db' is not known"),
        ("redis://me:secret@host:1/0x?prefix=a", "redis://host:1/0x: '/0x' is no database"),
    ],
)
def test_a_password_in_a_wrong_address_is_not_shown(address: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        opened(address)
    assert message in str(error.value) and "secret" not in str(error.value)


def test_an_address_is_shown_without_a_password() -> None:
    assert shown_address("redis://me:sec@ret@host:1/0?prefix=a@b:") == "redis://host:1/0?prefix=a@b:"
    assert shown_address("unix://:secret@/run/redis.sock") == "unix:///run/redis.sock"
    assert shown_address("redis://[::1]:1/0") == "redis://[::1]:1/0"
    assert shown_address("data/codes@home.sqlite") == "data/codes@home.sqlite"
