"""Store of recent codes in Redis: for many writers and readers on several machines.

An author is one string of 20 bytes a segment, behind 8 bytes: the latest time of a removed segment. A script of the
server adds segments to it, so that a call is atomic for each author, and removes old ones. A call that fails half-way
is repeated whole, which changes nothing that has arrived.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

import numpy as np

from trainer.console.errors import UserError
from trainer.console.setup_advice import REDIS
from trainer.semantic_ids.code_store import (
    ENTRY,
    AppendCounts,
    RecentRuns,
    SegmentCodes,
    StoreSettings,
    check_runs,
    latest_runs,
    removed_message,
)

T = TypeVar("T")

PREFIX = "limelight:codes:"
"""Default of ``?prefix=``: two codebook versions are in one database under two prefixes."""

CHUNK = 512
"""Authors of a pipeline."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 2.0

APPEND = """
if redis.call('EXISTS', KEYS[2]) == 0 then return redis.error_reply('EMPTIED') end
local text = redis.call('GET', KEYS[1]) or struct.pack('<i8', -1)
local runs_kept, segments_kept, gap_ms, check_every =
  tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local before = (#text - 8) / 20
-- Numbers of Lua are exact up to 2^53, which times are below. Ids of segments are compared in two halves.
local removed_ms = struct.unpack('<i8', text)
local function key(from, at)
  local low, high, known_ms = struct.unpack('<I4i4i8', from, at)
  return known_ms, high, low
end
local function after(text_a, a, text_b, b)
  local known_a, high_a, low_a = key(text_a, a)
  local known_b, high_b, low_b = key(text_b, b)
  if known_a ~= known_b then return known_a > known_b end
  if high_a ~= high_b then return high_a > high_b end
  return low_a > low_b
end
local stored, repeated, conflicting, late = 0, 0, 0, 0
for at = 1, #ARGV[1], 20 do
  local entry = string.sub(ARGV[1], at, at + 19)
  if key(entry, 1) <= removed_ms then
    late = late + 1
  else
    -- The 8 bytes of the id may also stand across two fields.
    local segment, found = string.sub(entry, 1, 8), 9
    repeat
      found = string.find(text, segment, found, true)
      if found and (found - 9) % 20 == 0 then break end
      if found then found = found + 1 end
    until not found
    if found then
      if string.sub(text, found, found + 19) == entry then repeated = repeated + 1
      else conflicting = conflicting + 1 end
    else
      stored = stored + 1
      -- The first place whose entry comes after the new one.
      local low, high = 0, (#text - 8) / 20
      if high > 0 and not after(text, 9 + 20 * (high - 1), entry, 1) then low = high end
      while low < high do
        local middle = math.floor((low + high) / 2)
        if after(text, 9 + 20 * middle, entry, 1) then high = middle else low = middle + 1 end
      end
      text = string.sub(text, 1, 8 + 20 * low) .. entry .. string.sub(text, 9 + 20 * low)
    end
  end
end
local count = (#text - 8) / 20
if math.floor(count / check_every) ~= math.floor(before / check_every) then
  local beyond, runs = 0, 0
  local later_code, later_ms
  for place = count - 1, 0, -1 do
    local known_ms, code = struct.unpack('<i8i4', text, 9 + 20 * place + 8)
    if later_code and (code ~= later_code or later_ms - known_ms > gap_ms) then
      runs = runs + 1
      if runs == runs_kept + 1 then beyond = place + 1 break end
    end
    later_code, later_ms = code, known_ms
  end
  beyond = math.max(beyond, count - segments_kept)
  while beyond > 0 and beyond < count and key(text, 9 + 20 * beyond) == key(text, 9 + 20 * (beyond - 1)) do
    beyond = beyond - 1
  end
  if beyond > 0 then
    local newest = key(text, 9 + 20 * (beyond - 1))
    text = struct.pack('<i8', newest) .. string.sub(text, 9 + 20 * beyond)
  end
end
if stored > 0 then redis.call('SET', KEYS[1], text) end
return {stored, repeated, conflicting, late}
"""


def shown_address(place: str) -> str:
    """Return an address without the user and the password that a URL may have: for messages and files."""
    address, mark, prefix = place.partition("?prefix=")
    return re.sub("//.*@", "//", address) + mark + prefix


class RedisCodeStore:
    """See :class:`trainer.semantic_ids.code_store.CodeStore`.

    Args:
        place: ``redis://HOST:PORT/DATABASE``, with ``?prefix=...`` for another prefix of the keys.
        settings: must be those of the store if it is there.
        retry_seconds: longest time to try again when the server does not answer.
        create: make the store if it is not there; otherwise it is refused.

    Raises:
        UserError: redis is not installed, the server does not answer, may remove keys by itself, or has other settings.
    """

    def __init__(self, place: str, settings: StoreSettings, retry_seconds: float, *, create: bool = True) -> None:
        self._place = shown_address(place).partition("?")[0]
        try:
            import redis
        except ImportError:
            raise UserError(f"{self._place}: {REDIS.advice}") from None
        no_retries = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        parts = urlsplit(place)
        query = parse_qs(parts.query)
        self._prefix = query.pop("prefix", [PREFIX])[-1]
        if query:
            raise UserError(f"{self._place}: {next(iter(query))!r} is not known; the address may end with ?prefix=...")
        if parts.scheme != "unix" and "@" in parts.path:
            raise UserError(f"{self._place}: not an address; write / in a password as %2F")
        if parts.scheme != "unix" and not parts.path.removeprefix("/").isdecimal() and parts.path not in ("", "/"):
            # The client would take database 0.
            raise UserError(f"{self._place}: {parts.path!r} is no database; write redis://HOST:PORT/NUMBER")
        self._settings, self._retry_seconds, self._create = settings, retry_seconds, create
        self._lost = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError)
        self._refused = redis.RedisError
        try:
            address = urlunsplit(parts._replace(query=""))
            self._client: Any = redis.Redis.from_url(address, socket_timeout=10, retry=no_retries)
        except ValueError as error:
            # The reason may have a part of the password.
            reason = "" if "@" in place else f" ({error})"
            raise UserError(f"{self._place}: not an address{reason}; write redis://HOST:PORT/DATABASE") from None
        self._script: str = ""
        self._retried(lambda: self._open())

    def append(self, codes: SegmentCodes) -> AppendCounts:
        """Add segments, see :meth:`trainer.semantic_ids.code_store.CodeStore.append`."""
        # Stable: the first of equal segments of a call is stored.
        order = np.argsort(codes.author, kind="stable")
        entries = np.empty(len(order), ENTRY)
        for name in ENTRY.names or ():
            entries[name] = getattr(codes, name)[order]
        authors, first = np.unique(codes.author[order], return_index=True)
        packed = entries.tobytes()
        edges = np.append(first, len(order)) * ENTRY.itemsize
        total = AppendCounts(0, 0, 0, 0)
        kept = self._settings
        bounds = (kept.runs_kept, kept.segments_kept, kept.gap_ms, max(1, kept.runs_kept // 4))
        for begin in range(0, len(authors), CHUNK):
            chunk = range(begin, min(begin + CHUNK, len(authors)))

            def send(chunk: range = chunk) -> list[Any]:
                pipeline = self._client.pipeline(transaction=False)
                for place in chunk:
                    part = packed[edges[place] : edges[place + 1]]
                    keys = (self._key(int(authors[place])), self._key_of_settings)
                    pipeline.evalsha(self._script, len(keys), *keys, part, *bounds)
                found: list[Any] = pipeline.execute()
                return found

            for answer in self._retried(send):
                total += AppendCounts(*answer)
        return total

    def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RecentRuns:
        """Return the latest runs, see :meth:`trainer.semantic_ids.code_store.CodeStore.recent`."""
        check_runs(self._place, runs, self._settings)
        counts, known_ms, code, removed = [], [], [], []
        for begin in range(0, len(authors), CHUNK):
            rows = slice(begin, begin + CHUNK)

            def send(rows: slice = rows) -> list[Any]:
                keys = [self._key(author) for author in authors[rows].tolist()]
                found: list[Any] = self._client.mget([self._key_of_settings, *keys])
                return found

            settings, *texts = self._retried(send)
            if settings is None:
                raise self._emptied()
            texts = [text or b"\xff" * 8 for text in texts]
            if any(len(text) % ENTRY.itemsize != 8 for text in texts):
                raise UserError(f"{self._place}: {self._prefix}* has strings that are no codes; name another prefix")
            removed += [np.frombuffer(text, "<i8", 1)[0] for text in texts]
            lengths = np.array([(len(text) - 8) // ENTRY.itemsize for text in texts])
            entries = np.frombuffer(b"".join([text[8:] for text in texts]), ENTRY)
            row = np.repeat(np.arange(len(texts)), lengths)
            visible = entries["known_ms"] <= as_of_ms[rows][row]
            counts.append(np.bincount(row[visible], minlength=len(texts)))
            known_ms.append(entries["known_ms"][visible])
            code.append(entries["code"][visible])
        none = np.empty(0, np.int64)
        visible_counts, visible_ms, visible_code = (
            np.concatenate([none, *part]).astype(np.int64) for part in (counts, known_ms, code)
        )
        found, enough = latest_runs(visible_counts, visible_ms, visible_code, runs, self._settings.gap_ms)
        short = np.flatnonzero(~enough & (np.array(removed, np.int64) >= 0))
        if len(short):
            raise UserError(removed_message(self._place, int(authors[short[0]]), int(as_of_ms[short[0]]), runs))
        return found

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _key(self, author: int) -> str:
        return f"{self._prefix}{author}"

    def _emptied(self) -> UserError:
        return UserError(f"{self._place}: has been emptied since it was opened; append the segments again")

    @property
    def _key_of_settings(self) -> str:
        return f"{self._prefix}settings"

    def _open(self) -> None:
        """Make the settings if they are not there, compare them, and load the script."""
        policy = self._eviction_policy()
        if policy != "noeviction":
            raise UserError(
                f"{self._place}: removes keys by itself when its memory is full (maxmemory-policy {policy}); set it to "
                "noeviction"
            )
        if self._create:
            self._client.set(self._key_of_settings, json.dumps(self._settings._asdict()), nx=True)
        elif not self._client.exists(self._key_of_settings):
            raise UserError(f"{self._place}: has no store of codes under {self._prefix}*; append segments first")
        try:
            stored = StoreSettings(**json.loads(self._client.get(self._key_of_settings)))
        except (TypeError, ValueError):
            raise UserError(
                f"{self._place}: {self._key_of_settings} is no setting of a store; name another prefix"
            ) from None
        self._settings.check(stored, self._place)
        self._script = self._client.script_load(APPEND)

    def _eviction_policy(self) -> str:
        """Return what the server does when its memory is full; a server that hides its settings is trusted."""
        try:
            return str(self._client.config_get("maxmemory-policy")["maxmemory-policy"])
        except self._lost:
            raise
        except (self._refused, KeyError):
            return "noeviction"

    def _retried(self, work: Callable[[], T]) -> T:
        """Run work, again while the server does not answer, with growing pauses.

        Raises:
            UserError: it did not answer in time, or it refused a command.
        """
        until, pause = time.monotonic() + self._retry_seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                return work()
            except self._lost as error:
                if time.monotonic() + pause > until:
                    raise UserError(
                        f"{self._place}: no answer in {self._retry_seconds:g} s ({error}); is the server running there?"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except self._refused as error:
                if type(error).__name__ == "NoScriptError":
                    # The server was started again, and has forgotten the script.
                    self._script = self._client.script_load(APPEND)
                    continue
                if "EMPTIED" in str(error):
                    raise self._emptied() from None
                # Without the text of the command that the client puts before the server's reason.
                reason = str(error).rpartition("caused error: ")[2]
                if "maxmemory" in reason:
                    reason = "its memory is full (maxmemory); nothing of this author's call was stored"
                raise UserError(f"{self._place}: {reason}") from None
