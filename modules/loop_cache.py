"""Files of compiled loops, which a damaged or missing place can only make slower to start.

numba's own files have no checksum: a file that was cut, or is of something else, ends in an error of pickle or in wrong
machine code.

Processes that start together need the same loops. One of them compiles a loop, and the others wait until they can load
it. They agree by a lock of the operating system, which ends with the process that has it. Without a place for the lock,
on a file system without locks, or after :data:`WAIT_SECONDS` a process compiles for itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import pickle
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

logger = logging.getLogger(__name__)

WAIT_SECONDS = 120.0
"""Longest time to wait for another process, which may have been stopped; a loop is compiled in some seconds."""
POLL_SECONDS = 0.05
"""Time between two looks at the lock."""

_DIGEST = hashlib.sha256().digest_size
_told: set[str] = set()


def tell_once(message: str) -> None:
    """Log a message, if this process or the one that it was forked from has not logged it before."""
    if message not in _told:
        _told.add(message)
        logger.info(message)


class LoopCache(FunctionCache):
    """numba's cache of one function, with a file for each signature that is checked before it is used.

    A file that cannot be used is compiled again and replaced. Where no file can be written, the function is compiled in
    each process. Both are logged.

    Args:
        function: to be compiled.
        what: its work, for the messages.
    """

    def __init__(self, function: Any, what: str) -> None:
        super().__init__(function)
        own: Any = vars(self)["_cache_file"]
        self._cache_file: Any = _LoopFiles(own)
        self._what = what
        self._lock: _Lock | None = None

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return the compiled function for a signature; None if there is no file that can be used.

        With None, this process has the lock until the function is saved or :meth:`release` is called.
        """
        key = self._index_key(signature, context.codegen())
        before = self._cache_file.version(key)
        found = self._usable(signature, context)
        if found is None and self._lock is None:
            self._lock = _Lock(self._cache_file.lock_path(key))
            self._lock.acquire(self._what)
            if self._cache_file.version(key) != before:
                found = self._usable(signature, context)
            if found is not None:
                self.release()
        return found

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Write the compiled function of a signature, if possible."""
        try:
            super().save_overload(signature, compiled)
        except OSError as error:
            logger.warning(f"a compiled loop cannot be kept for the next start: {error}")
        finally:
            self.release()

    def release(self) -> None:
        """Let other processes compile the function."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _usable(self, signature: Any, context: Any) -> Any:
        """Return what the file of a signature holds; None if there is none, or if it cannot be used."""
        try:
            return super().load_overload(signature, context)
        except Exception as error:
            # Broad, because pickle, numba and LLVM raise many types. The function is compiled then.
            logger.warning(f"a compiled loop cannot be used, and is compiled again: {error}")
            return None


class _LoopFiles:
    """Files of one function.

    Args:
        file: numba's own; it says where the files are, and the state of the function's source.
    """

    def __init__(self, file: Any) -> None:
        self._base = Path(file._cache_path, file._index_name).with_suffix("")
        self._state = (numba.__version__, file._source_stamp)

    def load(self, key: Any) -> Any:
        """Return what was saved for a key; None if there is no file, or one of another state of the source.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, stored = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(stored).digest() != digest:
            raise ValueError(f"{path}: damaged")
        state, found, data = pickle.loads(stored)
        return data if (state, found) == (self._state, key) else None

    def save(self, key: Any, data: Any) -> None:
        """Write what is to be loaded for a key, as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path, stored = self._path(key), dumps((self._state, key, data))
        tmp_path = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.partial")
        try:
            tmp_path.write_bytes(hashlib.sha256(stored).digest() + stored)
            os.replace(tmp_path, path)
        finally:
            tmp_path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove all files of the function."""
        for path in self._base.parent.glob(f"{self._base.name}.*.loop"):
            path.unlink(missing_ok=True)

    def version(self, key: Any) -> tuple[int, int] | None:
        """Return what changes whenever the file of a key is written; None if there is no file."""
        try:
            found = self._path(key).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def lock_path(self, key: Any) -> Path:
        """Return the path of the lock for a key."""
        path = self._path(key)
        return path.with_name(f".{path.name}.lock")

    def _path(self, key: Any) -> Path:
        return self._base.with_name(f"{self._base.name}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.loop")


class _Lock:
    """Lock among processes on a file, which exists only while a process has the lock or was killed with it.

    A process may wait for the lock on a file that its holder has removed, while another one makes a new file. Both may
    then have the lock. That is harmless: the removed file's holder has saved the loop, or all processes fail to.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self, what: str) -> None:
        """Take the lock as soon as no other process has it; go on without it where it cannot be had.

        Args:
            what: the work of the loop, for the message.
        """
        try:
            file = self._path.open("ab")
        except OSError:
            return
        last = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                # Locks by lockf belong to this process alone, not to the ones that it forks. Without LOCK_NB it could
                # not give up.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                held = error.errno in (errno.EACCES, errno.EAGAIN)
                if not held or time.monotonic() > last:
                    file.close()
                    if not held:
                        self._remove()
                    return
            else:
                self._file = file
                return
            tell_once(f"waiting for another process, which compiles loops of {what} for this processor")
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._file is not None:
            self._remove()
            self._file.close()
            self._file = None

    def _remove(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
