"""Address of a store of recent codes: SQLite by a path, Redis by a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from trainer.console.errors import UserError
from trainer.console.outputs import Output, local_path
from trainer.semantic_ids.code_store import CodeStore, StoreSettings
from trainer.semantic_ids.redis_store import RedisCodeStore
from trainer.semantic_ids.sqlite_store import SqliteCodeStore

RETRY_SECONDS = 30.0

REDIS = ("redis", "rediss", "unix")
"""Protocols of the URL of a Redis server."""


def open_store(place: str, settings: StoreSettings, retry_seconds: float = RETRY_SECONDS) -> CodeStore:
    """Open a store, and make it if it is not there.

    Args:
        place: path of an SQLite file, or ``redis://HOST:PORT/DATABASE``.
        settings: must be those of the store if it is there.
        retry_seconds: longest time to wait for a store that is locked or not reachable.

    Raises:
        UserError: the address is no place for a store, or the store is damaged, of other settings, or cannot be
            reached.
    """
    path = store_path(place)
    if path is None:
        return RedisCodeStore(place, settings, retry_seconds)
    return SqliteCodeStore(str(path), settings, retry_seconds)


def open_existing_store(place: str, version: str, retry_seconds: float = RETRY_SECONDS) -> CodeStore:
    """Open a store of a codebook version to read from it; nothing is made.

    Args:
        place: see :func:`open_store`.
        version: name of the codebook version.
        retry_seconds: see :func:`open_store`.

    Raises:
        UserError: there is no store, it is damaged or of another version, or it cannot be reached.
    """
    path = store_path(place)
    if path is not None and not path.exists():
        raise UserError(
            f"{place}: no such store of codes; `limelight quantize assign --store` and `limelight embed --follow` make "
            "one"
        )
    settings = StoreSettings(version)
    if path is None:
        return RedisCodeStore(place, settings, retry_seconds, create=False)
    return SqliteCodeStore(str(path), settings, retry_seconds)


def store_path(place: str) -> Path | None:
    """Return the path of an SQLite file that is there or can be made; None for Redis.

    Raises:
        UserError: a URL of another protocol, or a path in no directory or in one that the user may not write in.
    """
    if urlsplit(place).scheme in REDIS:
        return None
    path = local_path(place, "a store of codes", "name an SQLite file there, or redis://HOST:PORT/DATABASE")
    if not path.exists():
        Output.of(path).check()
    return path
