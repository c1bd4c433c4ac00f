"""Address of a store of recent codes: SQLite by a path, Redis by a URL."""

from __future__ import annotations

from urllib.parse import urlsplit

from trainer.semantic_ids.code_store import CodeStore, StoreSettings
from trainer.semantic_ids.redis_store import RedisCodeStore
from trainer.semantic_ids.sqlite_store import SqliteCodeStore

RETRY_SECONDS = 30.0


def open_store(place: str, settings: StoreSettings, retry_seconds: float = RETRY_SECONDS) -> CodeStore:
    """Open a store, and make it if it is not there.

    Args:
        place: path of an SQLite file, or ``redis://HOST:PORT/DATABASE``.
        settings: must be those of the store if it is there.
        retry_seconds: longest time to wait for a store that is locked or not reachable.

    Raises:
        UserError: the store is damaged, of other settings, or cannot be reached.
    """
    if urlsplit(place).scheme in ("redis", "rediss", "unix"):
        return RedisCodeStore(place, settings, retry_seconds)
    return SqliteCodeStore(place, settings, retry_seconds)
